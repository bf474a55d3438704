"""Visual question answering: data, answers, tokens, and questions to a live engine."""
