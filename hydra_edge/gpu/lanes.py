"""A lane: one execution context with a stream, buffers and CUDA graphs, for one caller at a time.

What TensorRT's guide asks for shapes it. A captured graph belongs to the state of its context, so
each graph has a context of its own; contexts of a lane never run at once, so they share scratch
memory. A context must have run a shape before it is captured.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hydra_edge.errors import ExecutionError, InputError
from hydra_edge.gpu.arrays import DeviceArray, Foreign
from hydra_edge.gpu.buffers import MAPPED_BYTES, Buffer
from hydra_edge.gpu.capture import UNDISTURBED, CaptureError, Graph, Graphs
from hydra_edge.gpu.device import Device, Stream
from hydra_edge.gpu.engines import Context, Engine, OutOfMemoryError

Array = npt.NDArray[np.generic]
Feeds = Mapping[str, Array | Foreign]
Shapes = dict[str, tuple[int, ...]]
_ALIGNMENT = 256  # of a tensor's address, for TensorRT; views of others' arrays may have less
_MOST_PLANS = 256
_CAPTURES = 3  # attempts: other libraries in the process may disturb one


@dataclass
class _Plan:
    """What a batch size and a choice of outputs come to: views into the buffers, and a graph."""

    batch: int
    feeds: dict[str, Array]
    answers: dict[str, Array]
    runs: int = 0
    context: Context | None = None
    graph: Graph | None = None
    captures: int = 0
    is_plain: bool = False  # it gets no graph


class Lane:
    """Runs an engine for one caller at a time. The device's context is current in use.

    Args:
        device: The GPU.
        engine: The program.
        graphs: Whether and how runs become CUDA graphs.
        mapped_bytes: See `Buffer`.

    Raises:
        OutOfMemoryError: There is no memory for it.
        ExecutionError: The device failed.
    """

    def __init__(
        self, device: Device, engine: Engine, graphs: Graphs, mapped_bytes: int = MAPPED_BYTES
    ) -> None:
        self._device, self._engine, self._graphs = device, engine, graphs
        self._mapped_bytes = mapped_bytes
        self._tensors = {tensor.name: tensor for tensor in (*engine.inputs, *engine.outputs)}
        self._plans: dict[tuple[int, tuple[str, ...]], _Plan] = {}
        self._context: Context | None = None
        self._bound: tuple[int, Mapping[str, int]] | None = None  # batch and foreign addresses
        with UNDISTURBED, contextlib.ExitStack() as cleanup:
            self._cleanup = cleanup
            try:
                self._allocate()
            except device.driver.MemoryError as exc:
                raise OutOfMemoryError(str(exc)) from exc
            except device.driver.Error as exc:
                raise _failure(str(exc)) from exc
            self._cleanup = cleanup.pop_all()

    def _allocate(self) -> None:
        self._stream = Stream(self._device)
        self._cleanup.callback(self._stream.destroy)
        size = self._engine.device_memory_bytes
        self._scratch = 0
        if size:
            memory = self._device.driver.mem_alloc(size)
            self._cleanup.callback(memory.free)
            self._scratch = int(memory)
        highs = [high for _, high in self._engine.profiles]
        self._profile = highs.index(max(highs))
        self._cleanup.callback(self._drop_contexts)
        self._context = self._new_context(self._profile)
        self._buffers: dict[str, Buffer] = {}
        for name, shape in self._shapes(self._context, max(highs)).items():
            size = math.prod(shape) * self._tensors[name].dtype.itemsize
            self._buffers[name] = Buffer(self._device, name, size, self._mapped_bytes)
            self._cleanup.callback(self._buffers[name].free)

    def run(self, feeds: Feeds, outputs: tuple[str, ...]) -> list[Array]:
        """Run once.

        Args:
            feeds: Arrays by input name; those of other libraries are read where they are.
            outputs: Which outputs to return.

        Returns:
            Copies on the CPU.

        Raises:
            InputError: Names, shapes or dtypes do not fit; nothing has run then.
            ExecutionError: The device failed; the lane must be closed then.
        """
        plan = self._plan(feeds, outputs)
        try:
            elsewhere = self._fill(plan, feeds)
            if plan.graph is not None and not elsewhere:
                plan.graph.launch(self._stream.handle)
                self._stream.synchronize()
            elif elsewhere or not self._may_capture(plan):
                self._run_plain(plan, elsewhere)
            else:
                self._run_and_capture(plan)
        except (self._device.driver.Error, CaptureError) as exc:
            raise _failure(str(exc)) from exc
        plan.runs += 1
        return [plan.answers[name].copy() for name in outputs]

    def run_on_device(self, feeds: Feeds, outputs: tuple[str, ...]) -> list[DeviceArray]:
        """Run once and leave the outputs on the GPU; see `run`."""
        plan = self._plan(feeds, outputs)
        try:
            arrays = {
                name: DeviceArray(self._device, answer.shape, answer.dtype)
                for name, answer in plan.answers.items()
            }
            elsewhere = self._fill(plan, feeds)
            self._run_plain(plan, elsewhere | {n: a.address for n, a in arrays.items()})
        except self._device.driver.Error as exc:
            raise _failure(str(exc)) from exc
        return [arrays[name] for name in outputs]

    def close(self) -> None:
        """Release everything. No error leaves it: a device that failed may refuse this, too."""
        with contextlib.suppress(self._device.driver.Error):
            self._stream.synchronize()
        with UNDISTURBED:
            self._cleanup.close()

    # What comes in.

    def _plan(self, feeds: Feeds, outputs: tuple[str, ...]) -> _Plan:
        """The plan for these feeds, which are checked against it."""
        first = next(iter(feeds.values()), None)
        batch = first.shape[0] if first is not None and first.shape else 0
        plan = self._plans.get((batch, outputs))
        if plan is None:
            plan = self._new_plan(batch, outputs)
        if feeds.keys() != plan.feeds.keys():
            raise InputError(
                f"The inputs {', '.join(feeds)} were given.",
                f"The engine takes {'; '.join(map(str, self._engine.inputs))}.",
                "Pass all of them, and no others.",
            )
        for name, view in plan.feeds.items():
            value = feeds[name]
            if value.shape != view.shape or value.dtype != view.dtype:
                raise InputError(
                    f"The input '{name}' is {value.dtype}{list(value.shape)}.",
                    f"The engine takes {self._tensors[name]}, and all inputs have one batch size.",
                    "Pass every input with that shape and dtype.",
                )
            if isinstance(value, Foreign):
                value.require_on(self._device)
        return plan

    def _new_plan(self, batch: int, outputs: tuple[str, ...]) -> _Plan:
        known = [tensor.name for tensor in self._engine.outputs]
        for name in outputs:
            if name not in known:
                raise InputError(
                    f"The engine has no output '{name}'.",
                    f"It has: {', '.join(known)}.",
                    "Ask for those.",
                )
        shapes = self._shapes(self._ready_context(batch), batch)
        self._bound = None
        views = {
            name: self._buffers[name].view(shape, self._tensors[name].dtype)
            for name, shape in shapes.items()
        }
        if len(self._plans) >= _MOST_PLANS:
            self._plans = {key: plan for key, plan in self._plans.items() if plan.context}
        plan = _Plan(
            batch,
            {tensor.name: views[tensor.name] for tensor in self._engine.inputs},
            {name: views[name] for name in outputs},
        )
        self._plans[batch, outputs] = plan
        return plan

    def _fill(self, plan: _Plan, feeds: Feeds) -> dict[str, int]:
        """Copy arrays of the CPU into the buffers; addresses of those that are read elsewhere."""
        elsewhere = {}
        for name, view in plan.feeds.items():
            value = feeds[name]
            if not isinstance(value, Foreign):
                view[...] = value
                continue
            value.wait(self._device, self._stream)
            if value.address % _ALIGNMENT:
                elsewhere[name] = self._buffers[name].address
                self._device.driver.memcpy_dtod_async(
                    elsewhere[name], value.address, value.nbytes, self._stream.raw
                )
            else:
                elsewhere[name] = value.address
        return elsewhere

    # Running.

    def _run_plain(self, plan: _Plan, elsewhere: Mapping[str, int]) -> None:
        context = self._ready_context(plan.batch)
        if self._bound != (plan.batch, elsewhere):
            self._shapes(context, plan.batch)
            self._bind(context, elsewhere)
            self._bound = plan.batch, elsewhere
        self._enqueue(context, plan, elsewhere)
        self._stream.synchronize()

    def _run_and_capture(self, plan: _Plan) -> None:
        """Run on a context for this plan alone, then keep that as a graph for the next time."""
        if plan.context is None:
            try:
                with UNDISTURBED:
                    plan.context = self._new_context(self._find_profile(plan.batch))
            except OutOfMemoryError as exc:
                plan.is_plain = True
                self._graphs.explain(f"There is no memory for the context of a graph: {exc}.")
                self._run_plain(plan, {})
                return
            self._shapes(plan.context, plan.batch)
            self._bind(plan.context, {})
        context = plan.context
        self._enqueue(context, plan, {})
        self._stream.synchronize()
        if not context.is_capturable(self._stream.handle):
            self._graphs.explain("The engine says that it cannot be captured yet.")
            return
        with UNDISTURBED:
            self._capture(context, plan)

    def _capture(self, context: Context, plan: _Plan) -> None:
        assert self._graphs.recorder is not None
        plan.captures += 1
        try:
            plan.graph = self._graphs.recorder.record(
                self._stream.handle, lambda: self._enqueue_for_capture(context, plan)
            )
        except CaptureError as exc:
            context.close()
            plan.context = None
            if plan.captures >= _CAPTURES:
                plan.is_plain = True
                self._graphs.explain(str(exc))

    def _may_capture(self, plan: _Plan) -> bool:
        """From its second run on, a plan gets a graph: a batch size that comes once does not."""
        if plan.is_plain or not plan.runs or self._graphs.recorder is None:
            return False
        if plan.context is not None:
            return True
        if sum(p.context is not None for p in self._plans.values()) < self._graphs.most:
            return True
        plan.is_plain = True
        self._graphs.explain(
            f"There are {self._graphs.most} graphs already, for the batch sizes that came first."
        )
        return False

    def _enqueue(self, context: Context, plan: _Plan, elsewhere: Mapping[str, int]) -> None:
        for name, view in plan.feeds.items():
            if name not in elsewhere:
                self._buffers[name].upload(view.nbytes, self._stream)
        if not context.execute_async(self._stream.handle):
            raise _failure(f"The engine was not started. {self._engine.words()}")
        for name, view in plan.answers.items():
            if name not in elsewhere:
                self._buffers[name].download(view.nbytes, self._stream)

    def _enqueue_for_capture(self, context: Context, plan: _Plan) -> None:
        try:
            self._enqueue(context, plan, {})
        except self._device.driver.Error as exc:
            raise _failure(str(exc)) from exc

    # Contexts.

    def _new_context(self, profile: int) -> Context:
        return self._engine.create_context(profile, self._stream.handle, self._scratch)

    def _ready_context(self, batch: int) -> Context:
        """The context without a graph, in a profile that holds the batch."""
        context, profile = self._context, self._find_profile(batch)
        assert context is not None
        if profile != self._profile:
            self._require(
                context.set_profile(profile, self._stream.handle), f"switch to profile {profile}"
            )
            self._profile = profile
        return context

    def _find_profile(self, batch: int) -> int:
        """The narrowest profile that holds the batch: it was optimized for the least else."""
        profiles = self._engine.profiles
        holding = [n for n, (low, high) in enumerate(profiles) if low <= batch <= high]
        if holding:
            return min(holding, key=lambda n: profiles[n][1] - profiles[n][0])
        ranges = ", ".join(f"{low} to {high}" for low, high in profiles)
        raise InputError(
            f"A batch of {batch} was to be run.",
            f"The engine takes {ranges} samples.",
            "Run such batches, or compile the engine for others.",
        )

    def _shapes(self, context: Context, batch: int) -> Shapes:
        """Set the inputs' shapes; those of all tensors."""
        shapes: Shapes = {}
        for tensor in self._engine.inputs:
            shapes[tensor.name] = (batch, *tensor.shape[1:])
            self._require(
                context.set_input_shape(tensor.name, shapes[tensor.name]),
                f"take {list(shapes[tensor.name])} as the shape of '{tensor.name}'",
            )
        for tensor in self._engine.outputs:
            shapes[tensor.name] = tuple(context.get_tensor_shape(tensor.name))
            if any(size < 0 for size in shapes[tensor.name]):
                raise ExecutionError(
                    f"The output '{tensor.name}' has the shape {list(shapes[tensor.name])}.",
                    "Its size depends on the data, so no memory can be set aside for it.",
                    "Compile a model whose outputs have sizes that follow from the batch.",
                )
        return shapes

    def _bind(self, context: Context, elsewhere: Mapping[str, int]) -> None:
        for name, buffer in self._buffers.items():
            address = elsewhere.get(name, buffer.address)
            self._require(context.set_tensor_address(name, address), f"read or write '{name}'")

    def _require(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise _failure(f"The engine does not {what}. {self._engine.words()}")

    def _drop_contexts(self) -> None:
        for plan in self._plans.values():
            if plan.graph is not None:
                with contextlib.suppress(CaptureError):
                    plan.graph.free()
            if plan.context is not None:
                plan.context.close()
            plan.graph = plan.context = None
        if self._context is not None:
            self._context.close()
        self._context = None


def _failure(why: str) -> ExecutionError:
    return ExecutionError(
        "The GPU did not run the engine.",
        why if why.endswith(".") else f"It says: {why}.",
        "There is no result. Run it again; if it fails again, see whether the GPU's memory is "
        "full, and what `dmesg` says.",
    )
