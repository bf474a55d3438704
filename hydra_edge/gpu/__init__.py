"""What builds, loads and runs engines on a GPU. Importing it loads neither CUDA nor TensorRT.

Building: `building`, `progress`, `messages`, `layers`, `plugin`. Loading and running:

    engines.py            what a runner needs of an engine, whoever made it
    device.py             the GPU: its primary context and what it is
    buffers.py            page-locked memory on the way to the GPU and back
    capture.py            CUDA graphs
    lanes.py              one execution context with its stream, buffers and graphs
    running.py            `EngineRunner`: as many lanes as there are callers
    arrays.py, dlpack.py  arrays on the GPU, ours and those of others
    tensorrt_engine.py    TensorRT's objects as `engines.Engine`
    fit.py                whether an engine is for this machine
"""
