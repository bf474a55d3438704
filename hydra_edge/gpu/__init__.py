"""What builds, loads and runs engines on a GPU. Importing it loads neither CUDA nor TensorRT.

Engines are made and checked by

    building.py           from a lowered model to an engine; messages.py, progress.py: what is said
    layers.py             what an engine really computes in
    plugin.py             the library with our plugin
    refitting.py          new weights for an engine
    fit.py                whether an engine is for this machine
    opening.py            from a file's bytes to a runner

and run by

    engines.py            what a runner needs of an engine, whoever made it
    tensorrt_engine.py    TensorRT's objects as `engines.Engine`
    device.py             the GPU: its primary context and what it is
    buffers.py            page-locked memory on the way to the GPU and back
    capture.py            CUDA graphs
    lanes.py              one execution context with its stream, buffers and graphs
    running.py            `EngineRunner`: as many lanes as there are callers
    arrays.py, dlpack.py  arrays on the GPU, ours and those of others
"""
