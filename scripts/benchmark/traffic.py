"""What torch's compiler emits for the blocks of a network on an H100, without one: kernels, bytes,
FLOPs, and an estimate of the time of a step.

The blocks are compiled as training and sampling compile them (`ddt.distributed.compile`), of fake
tensors (`scripts.benchmark.fake_gpu`); the generated code is read, never run. A kernel's bytes are
the compiler's own count of what it reads and writes once, whatever caches do; those of a kernel
written by hand are all its tensors.
"""

import contextlib
import copy
import dataclasses
import logging
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from ddt.distributed.compile import compile_block
from ddt.errors import require
from ddt.files import write_json
from ddt.generation.generator import cast_weights
from ddt.model import Denoiser
from ddt.objective import FlowMatching
from ddt.precision import Dtype, autocast
from ddt.receipts import command_line
from ddt.tables import markdown_table
from ddt.training.throughput import training_flops
from scripts.benchmark.fake_gpu import CAPABILITY, CUDA, H100, fake_gpu, place
from scripts.benchmark.settings import KernelSettings

log = logging.getLogger(__name__)
NUM_CLASSES = 1000
OPTIMIZER_BYTES = 4 * (7 + 3)  # a weight: AdamW reads four numbers and writes three; the EMA reads two, writes one
SMALL = 0.01  # of a case's bytes; smaller kernels share a line of the report


@dataclasses.dataclass
class Kernel:
    """A generated kernel, or one written by hand, and its launches in a graph.

    bytes: of all launches. registers, spills: a thread's, the bytes of spilled registers too, the
    most of the configurations that it may be launched with; None where it was not assembled.
    """

    name: str
    launches: int
    bytes: int
    registers: int | None = None
    spills: int | None = None


@dataclasses.dataclass
class Product:
    """A matrix product or attention, which libraries compute."""

    name: str
    flops: int
    bytes: int


@dataclasses.dataclass
class Graph:
    """A compiled graph: of a forward pass, or of a backward one."""

    code: str
    kernels: list[Kernel]
    products: list[Product]


@dataclasses.dataclass
class BlockCase:
    """A block's graphs in training (forward, backward) or sampling (one)."""

    stack: str  # "encoder", "decoder", or "stack" where there is one
    use: str  # "training", "sampling", or "sampling, kept modulations"
    graphs: list[Graph]

    @property
    def kernels(self) -> list[Kernel]:
        return [kernel for graph in self.graphs for kernel in graph.kernels]

    @property
    def products(self) -> list[Product]:
        return [product for graph in self.graphs for product in graph.products]

    @property
    def bytes(self) -> int:
        """Bytes of element-wise traffic."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def launches(self) -> int:
        """Launches, of products too."""
        return sum(kernel.launches for kernel in self.kernels) + len(self.products)


@dataclasses.dataclass(frozen=True)
class Card:
    """Rates: FLOP/s that the network's products reach, byte/s of a copy."""

    product_rate: float
    copy_rate: float

    def products(self, case: BlockCase) -> float:
        """Return the seconds of a block's products, each bound by arithmetic or by memory."""
        return sum(max(each.flops / self.product_rate, each.bytes / self.copy_rate) for each in case.products)

    def traffic(self, case: BlockCase) -> float:
        """Return the seconds of a block's element-wise kernels."""
        return case.bytes / self.copy_rate

    def block(self, case: BlockCase) -> float:
        """Return the seconds of a block."""
        return self.products(case) + self.traffic(case)


# --- compiling


class Emitted(BaseException):
    """Ends a compilation when its code is there; no Exception, which the compiler would wrap."""


def fake_driver() -> Any:
    """Return a driver for Triton that knows its target alone."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):
        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], H100.warp_size)

        def get_active_torch_device(self) -> torch.device:
            return CUDA

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_benchmarker(self) -> Any:
            return None

    return Driver()


@contextlib.contextmanager
def emitted_graphs() -> Iterator[list[Graph]]:
    """Context, inside `fake_gpu`, in which compiled code is generated for an H100 and listed, and
    its uncompiled form runs in its place.
    """
    try:
        import triton
    except ImportError:
        require(False, "the kernels are Triton's, which is not installed: pip install triton")
    import torch._functorch.config
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import compile_fx, config, scheduler
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.utils import fresh_cache

    graphs: list[Graph] = []
    generate, compile_whole, compile_inner = GraphLowering.codegen, compile_fx.compile_fx, compile_fx.compile_fx_inner

    def codegen(lowering: Any) -> None:
        code = generate(lowering)[0]
        raise Emitted(getattr(code, "value", code), by_hand(lowering))

    def inner(module: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        original = copy.deepcopy(module)  # the compiler changes its own
        products = counted_products(original)
        try:
            compile_inner(module, inputs, **kwargs)
        except Emitted as emitted:
            code, handwritten = emitted.args
            graphs.append(Graph(code, counted_kernels(code, handwritten), products))

        def run(arguments: list[Any]) -> Any:
            values = list(arguments)
            arguments.clear()
            return torch.fx.Interpreter(original).run(*values)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def whole(module: Any, inputs: Any, **kwargs: Any) -> Any:
        return compile_whole(module, inputs, **{**kwargs, "inner_compile": inner})

    replaced = [
        (compile_fx, "compile_fx", whole),
        (GraphLowering, "codegen", codegen),
        (scheduler, "has_triton", lambda: True),
        (triton_helpers, "set_driver_to_gpu", lambda: None),
        (triton.runtime.driver, "_active", fake_driver()),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda device=None: H100)),
    ]
    answers = {
        "get_device_properties": H100, "current_device": 0, "set_device": None, "device_count": 1, "synchronize": None,
        "get_compute_capability": 90, "exchange_device": 0, "maybe_exchange_device": 0, "get_raw_stream": 0,
        "is_bf16_supported": True, "is_triton_capable": True,
    }  # fmt: skip
    replaced += [
        (CudaInterface, name, staticmethod(lambda *args, answer=answer, **kwargs: answer))
        for name, answer in answers.items()
    ]
    torch._dynamo.reset()
    DeviceProperties.create.cache_clear()
    with contextlib.ExitStack() as stack:
        for where, name, value in replaced:
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(
            config.patch(
                profile_bandwidth=True, fx_graph_cache=False, fx_graph_remote_cache=False, compile_threads=1,
                use_static_cuda_launcher=False,
            )
        )  # fmt: skip
        stack.enter_context(
            torch._functorch.config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True)
        )
        stack.enter_context(fresh_cache())
        try:
            yield graphs
        finally:
            DeviceProperties.create.cache_clear()
            torch._dynamo.reset()


# --- counting


def size_of(value: Any) -> int:
    """Return a tensor's bytes, those of a tuple's tensors, 0 for anything else."""
    if isinstance(value, tuple | list):
        return sum(map(size_of, value))
    if not isinstance(value, Tensor):
        return 0
    return value.dtype.itemsize * hint(value.numel())


def hint(size: Any) -> int:
    """Return a size, of a dynamic one that of the example."""
    return size if isinstance(size, int) else int(size.node.hint)


def counted_products(module: torch.fx.GraphModule) -> list[Product]:
    """Return the products and attentions of a graph."""
    products = []
    for node in module.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if node.op != "call_function" or packet not in flop_registry:
            continue
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
        flops = flop_registry[packet](*args, **kwargs, out_val=node.meta["val"])
        products.append(Product(packet.__name__, hint(flops), size_of(args) + size_of(node.meta["val"])))
    return products


def by_hand(lowering: Any) -> list[int]:
    """Return the bytes of the tensors of each launch of a kernel written by hand, in order."""
    from torch._inductor import ir

    sizes = lowering.sizevars
    example = getattr(sizes, "optimization_hint", None) or sizes.size_hint  # torch 2.11 has the second alone

    def numel(buffer: Any) -> int:
        return math.prod(int(example(side)) for side in buffer.get_size())

    launches = [node.node for node in lowering.scheduler.nodes if isinstance(node.node, ir.UserDefinedTritonKernel)]
    return [
        sum({b.get_name(): numel(b) * b.get_dtype().itemsize for b in op.inputs if hasattr(b, "get_size")}.values())
        for op in launches
    ]


def sources(code: str) -> dict[str, str]:
    """Return the source of each kernel of a generated module."""
    return dict(re.findall(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str", code, re.S | re.M))


def counted_kernels(code: str, handwritten: list[int]) -> list[Kernel]:
    """Return the kernels that a generated module launches, the one with most bytes first."""
    kernels, left = {}, iter(handwritten)
    known = {name: re.search(r"'kernel_num_gb': ([\d.e+-]+)", source) for name, source in sources(code).items()}
    for name in re.findall(r"^\s+(\w+)\.run\(", code, re.M):
        found = known[name]
        kernel = kernels.setdefault(name, Kernel(name, 0, 0))
        kernel.launches += 1
        kernel.bytes += next(left) if found is None else round(1e9 * float(found[1]))
    return sorted(kernels.values(), key=lambda kernel: -kernel.bytes)


def assemble(graph: Graph) -> None:
    """Compile each kernel of a graph for the H100, inside `emitted_graphs`; note its registers and
    spills. Raises RuntimeError where Triton or ptxas refuses one.
    """
    import triton
    from torch._inductor.codecache import PyCodeCache

    source = sources(graph.code)
    for kernel in graph.kernels:
        text = source[kernel.name].replace("\\\\", "\\")
        tuner = getattr(PyCodeCache.load(text), re.findall(r"^def (\w+)\(", text, re.M)[-1])
        tuner.precompile(warm_cache_only=True)
        used = []
        for result in tuner.compile_results:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "kernel.ptx")
                file.write_text(result.kernel.asm["ptx"])
                arguments = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", file, "-o", "/dev/null"]
                said = subprocess.run(arguments, capture_output=True, text=True, check=True).stderr
            numbers = re.search(r"(\d+) bytes spill stores.*?Used (\d+) registers", said, re.S)
            assert numbers is not None, said
            used.append((int(numbers[2]), int(numbers[1])))
        kernel.registers, kernel.spills = (max(values) for values in zip(*used, strict=True))


# --- the blocks of a network


def first_calls(network: Denoiser, call: Callable[[], Any]) -> list[tuple[Any, ...]]:
    """Return the arguments with which `call` calls the first block of each of a network's stacks;
    of those that it does not call, ().
    """
    stacks = network.stacks
    seen: list[tuple[Any, ...]] = [() for _ in stacks]
    with contextlib.ExitStack() as hooks:
        for number, stack in enumerate(stacks):

            def note(block: nn.Module, arguments: Any, number: int = number) -> None:
                seen[number] = arguments

            hooks.callback(stack.blocks[0].register_forward_pre_hook(note).remove)
        call()
    return seen


def stack_names(network: Denoiser) -> list[str]:
    """Return the names of a network's stacks."""
    return ["encoder", "decoder"] if network.shares_encoder else ["stack"]


def block_calls(network: Denoiser, x_t: Tensor, training: bool) -> list[tuple[str, str, nn.Module, tuple[Any, ...]]]:
    """Return (stack, use, block, arguments) of the kinds of calls that a network makes of its
    blocks for x_t (B, C, H, W).
    """
    t, y = (torch.zeros(len(x_t), dtype=dtype, device=x_t.device) for dtype in (torch.float32, torch.int64))
    use, blocks = "training" if training else "sampling", [stack.blocks[0] for stack in network.stacks]
    calls = first_calls(network, lambda: network(x_t, t, y))
    found = [(*each, call) for *each, call in zip(stack_names(network), [use] * len(calls), blocks, calls, strict=True)]
    if network.shares_encoder and not training:
        z_t = network.encode(x_t, t, y)
        kept = network.modulations(z_t)
        _, call = first_calls(network, lambda: network.decode(x_t, z_t, kept))
        found.append(("decoder", "sampling, kept modulations", blocks[1], call))
    return found  # type: ignore[return-value]


def compiled_blocks(
    build: Callable[..., Denoiser], channels: int, latent_size: int, batch_size: int, dtype: Dtype, training: bool,
    with_assembly: bool = False,
) -> Iterator[BlockCase]:  # fmt: skip
    """Compile a block of each stack of a network for an H100, as training or sampling does, and
    yield what came out.

    build: (in_channels, num_classes) → network. Raises RuntimeError for a kernel that
    `with_assembly` cannot be compiled.
    """
    with torch.device("meta"):
        network = build(in_channels=channels, num_classes=NUM_CLASSES)
    if not training:
        cast_weights(network, dtype)  # as sample.py does
    with fake_gpu(), autocast(CUDA, dtype), torch.set_grad_enabled(training):
        x_t = torch.zeros(batch_size, channels, latent_size, latent_size, device=CUDA)
        for stack, use, block, call in block_calls(place(network), x_t, training):
            arguments = [leaf(each) for each in call] if training else call
            with emitted_graphs() as graphs:
                compile_block(block, dynamic=not training)
                block(*arguments)
                for graph in graphs if with_assembly else []:
                    assemble(graph)
            yield BlockCase(stack, use, graphs)


def leaf(value: Any) -> Any:
    """Return a tensor without its past, to ask for its gradient; anything else as it is."""
    return value.detach().requires_grad_() if isinstance(value, Tensor) else value


# --- the report


def report(settings: KernelSettings) -> None:
    """Compile, count and estimate; print tables and write all numbers to `out`."""
    cases: list[BlockCase] = []
    card = Card(1e12 * settings.product_tflops, 1e12 * settings.copy_tbs)
    for training, batch_size in ((True, settings.batch_size), (False, settings.sampling_batch_size)):
        for case in compiled_blocks(
            settings.model.build, settings.channels, settings.latent_size, batch_size, settings.dtype, training,
            settings.assemble,
        ):  # fmt: skip
            log.info("\n%s", block_table(case, card))
            cases.append(case)
    with torch.device("meta"):
        network = settings.model.build(in_channels=settings.channels, num_classes=NUM_CLASSES)
    steps = estimates(network, cases, settings, card)
    log.info("\n%s", step_table(steps))
    if settings.out is not None:
        Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(settings.out), {
            "kind": "kernels", "torch": torch.__version__, "command": command_line(),
            "settings": {**{key: value for key, value in vars(settings).items() if key != "choices"},
                         "model": settings.choices["model"]},
            "blocks": [
                {"stack": case.stack, "use": case.use, "bytes": case.bytes, "launches": case.launches,
                 "graphs": [{"kernels": [dataclasses.asdict(kernel) for kernel in graph.kernels],
                             "products": [dataclasses.asdict(product) for product in graph.products]}
                            for graph in case.graphs]}
                for case in cases
            ],
            "steps": steps,
        })  # fmt: skip
        log.info("written: %s", settings.out)


def estimates(network: Denoiser, cases: list[BlockCase], settings: KernelSettings, card: Card) -> list[dict[str, Any]]:
    """Return the estimated parts of a training step and of the forwards of sampling, in seconds.

    What is outside of the blocks counts by its FLOPs, not its bytes.
    """
    depths = dict(zip(stack_names(network), (len(stack.blocks) for stack in network.stacks), strict=True))

    def row(name: str, used: list[BlockCase], others: float) -> dict[str, Any]:
        products = sum(depths[case.stack] * card.products(case) for case in used)
        traffic = sum(depths[case.stack] * card.traffic(case) for case in used)
        launches = sum(depths[case.stack] * case.launches for case in used)
        return {"step": name, "products": products, "element-wise": traffic, "others": others,
                "seconds": products + traffic + others, "launches": launches}  # fmt: skip

    training = [case for case in cases if case.use == "training"]
    shape = settings.channels, settings.latent_size, settings.latent_size
    flops = settings.batch_size * training_flops(FlowMatching(network), shape)
    inside = sum(depths[case.stack] * product.flops for case in training for product in case.products)
    num_weights = sum(parameter.numel() for parameter in network.parameters())
    others = max(0, flops - inside) / card.product_rate + OPTIMIZER_BYTES * num_weights / card.copy_rate
    step = row(f"training, {settings.batch_size} images", training, others)
    step["images_per_second"] = settings.batch_size / step["seconds"]
    step["share_of_matmul"] = flops / step["seconds"] / (1e12 * settings.matmul_tflops)
    sampling = [case for case in cases if case.use != "training"]
    return [step, *(row(f"{case.stack}, {case.use}, {settings.sampling_batch_size} rows", [case], 0.0)
                    for case in sampling)]  # fmt: skip


def block_table(case: BlockCase, card: Card) -> str:
    """Return the table of a block's kernels and products."""
    whole = card.block(case)

    def line(name: str, launches: int, size: int, seconds: float, others: str) -> list[str]:
        return [name, str(launches), f"{size / 1e6:,.0f}", f"{1e6 * seconds:,.0f}", f"{seconds / whole:.0%}", others]

    rows, small = [], []
    for kernel in case.kernels:
        if kernel.bytes < SMALL * case.bytes:
            small.append(kernel)
            continue
        others = "" if kernel.registers is None else f"{kernel.registers} registers, {kernel.spills} bytes spilled"
        rows.append(line(kernel.name, kernel.launches, kernel.bytes, kernel.bytes / card.copy_rate, others))
    size = sum(kernel.bytes for kernel in small)
    rows.append(line("smaller kernels", sum(each.launches for each in small), size, size / card.copy_rate, ""))
    rows.append(line("element-wise", case.launches - len(case.products), case.bytes, card.traffic(case), ""))
    flops, size = (sum(getattr(each, name) for each in case.products) for name in ("flops", "bytes"))
    rows.append(line("products", len(case.products), size, card.products(case), f"{flops / 1e12:.3g} TFLOP"))
    return markdown_table([f"{case.stack} block, {case.use}", "launches", "MB", "µs", "time", ""], rows, "lrrrrl")


def step_table(steps: list[dict[str, Any]]) -> str:
    """Return the table of the estimated steps."""
    rows = []
    for step in steps:
        milliseconds = [f"{1e3 * step[name]:.3g}" for name in ("products", "element-wise", "others", "seconds")]
        rate = f"{step['images_per_second']:.0f}" if "images_per_second" in step else ""
        share = f"{step['share_of_matmul']:.0%}" if "share_of_matmul" in step else ""
        rows.append([step["step"], *milliseconds, str(step["launches"]), rate, share])
    head = ["estimate, without a card", "products, ms", "element-wise", "others", "in all", "launches of blocks",
            "images/s", "of a product's rate"]  # fmt: skip
    return markdown_table(head, rows)
