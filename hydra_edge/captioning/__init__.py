"""Dense captioning: where things are in an image, what each is, and how sure that is.

`networks` and `training` make members and students (torch), `exporting` turns one into graphs,
`models`, `decoding` and `captioner` run the compiled programs, `evaluation` judges what they say.
"""
