"""Products of other tools' packed matrices, each in its tool's own kernels, for matvec.py and matmul.py to take turns with.

This file is both ends: ``PeerProcess`` starts it by the interpreter of a tool's environment (``quern peers install``), where
``main`` builds as many random matrices as fill a pool, answers with their sizes, and then times whatever it is asked to.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CONTENDERS = {
    "llama.cpp": ("Q4_0", "Q4_K", "Q2_K", "IQ3_S", "IQ2_XXS", "Q8_0"),
    "onnxruntime": ("int4-g128", "int4-g32"),
    "openvino": ("int4-g128", "int8"),
}
SETTLE = 0.03
"""Seconds in which the threads of the one before fall asleep."""


class PeerProcess:
    """A tool's process with matrices ``(rows, columns)`` and inputs ``(tokens, columns)``; None of it runs until asked."""

    def __init__(self, peer: str, rows: int, columns: int, tokens: int, threads: int, pool: int) -> None:
        from quern.peers.environment import Environment

        environment = Environment.of(peer)
        if environment.installed() is None:
            raise SystemExit(f"{peer} is not installed; run `quern peers install {peer}`")
        request = {
            "peer": peer,
            "rows": rows,
            "columns": columns,
            "tokens": tokens,
            "threads": threads,
            "pool": pool,
            "prefix": str(environment.prefix),
        }
        self._process = subprocess.Popen(
            [str(environment.python), __file__],
            env=environment.variables(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.sizes: dict[str, int] = self._ask(request)
        self.contenders = {f"{peer} {name}": self._timed(name) for name in self.sizes}
        self.sizes = {f"{peer} {name}": size for name, size in self.sizes.items()}

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask(self, what: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self._process.args[0]!r} ended with {self._process.wait()}")
        return json.loads(answer)

    def _timed(self, name: str) -> Callable[[], float]:
        def run() -> float:
            time.sleep(SETTLE)
            seconds = float(self._ask(name))
            time.sleep(SETTLE)
            return seconds

        return run


Products = dict[str, Any]
"""By name: bytes of one matrix, how many matrices one call multiplies by, and the call, as a triple."""


def llama_products(request: dict[str, Any]) -> Products:
    """ggml by its C functions; matrices lie in the buffer that llama.cpp would choose (AMX, repacked, or as they are)."""
    folder = Path(request["prefix"]) / "llama.cpp" / "bin"
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    pointer, size_t, long_ = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64

    class InitParams(ctypes.Structure):
        _fields_ = (("mem_size", size_t), ("mem_buffer", pointer), ("no_alloc", ctypes.c_bool))

    def bound(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        return function

    init = bound(base, "ggml_init", pointer, InitParams)
    new_matrix = bound(base, "ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, long_, long_)
    multiply = bound(base, "ggml_mul_mat", pointer, pointer, pointer, pointer)
    new_graph = bound(base, "ggml_new_graph", pointer, pointer)
    expand = bound(base, "ggml_build_forward_expand", None, pointer, pointer)
    block_size = bound(base, "ggml_blck_size", long_, ctypes.c_int)
    row_size = bound(base, "ggml_row_size", size_t, ctypes.c_int, long_)
    allocate = bound(base, "ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer)
    set_tensor = bound(base, "ggml_backend_tensor_set", None, pointer, pointer, size_t, size_t)
    compute = bound(base, "ggml_backend_graph_compute", ctypes.c_int, pointer, pointer)
    supports = bound(base, "ggml_backend_dev_supports_op", ctypes.c_bool, pointer, pointer)
    device_of = bound(base, "ggml_backend_reg_dev_get", pointer, pointer, size_t)
    own_buffers = bound(base, "ggml_backend_dev_buffer_type", pointer, pointer)
    address = bound(base, "ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p)
    buffer_name = bound(base, "ggml_backend_buft_name", ctypes.c_char_p, pointer)
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)(lambda *_: None)
    bound(base, "ggml_log_set", None, type(silent), pointer)(silent, None)
    registry = bound(cpu, "ggml_backend_cpu_reg", pointer)()
    backend = bound(cpu, "ggml_backend_cpu_init", pointer)()
    bound(cpu, "ggml_backend_cpu_set_n_threads", None, pointer, ctypes.c_int)(backend, request["threads"])
    device = device_of(registry, 0)
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(address(registry, b"ggml_backend_dev_get_extra_bufts"))
    found, buffers = extra(device), []
    for number in range(16):
        if not found[number]:
            break
        buffers.append(found[number])
    buffers.append(own_buffers(device))
    rows, columns, tokens = request["rows"], request["columns"], request["tokens"]
    random = np.random.default_rng(0)
    codes = {"Q4_0": 2, "Q8_0": 8, "Q2_K": 10, "Q4_K": 12, "IQ2_XXS": 16, "IQ3_S": 21}

    def product(kind: int) -> tuple[str, int, int, Callable[[], object]]:
        size = rows * row_size(kind, columns)
        count = max(2, request["pool"] // size) if tokens == 1 else 2
        for buffer in buffers:
            weights_memory = init(InitParams(1 << 20, None, True))
            memory = init(InitParams(1 << 24, None, True))
            weights = [new_matrix(weights_memory, kind, columns, rows) for _ in range(count)]
            inputs = new_matrix(memory, 0, columns, tokens)
            products = [multiply(memory, weight, inputs) for weight in weights]
            assert allocate(weights_memory, buffer)
            assert allocate(memory, buffers[-1])
            if supports(device, products[0]):
                break
        # a clear bit in each exponent that a byte may end keeps random scales finite
        data = random.integers(0, 256, size, np.uint8) & np.uint8(0xBB)
        for weight in weights:
            set_tensor(weight, data.ctypes.data, 0, size)
        values = random.standard_normal((tokens, columns)).astype(np.float32)
        set_tensor(inputs, values.ctypes.data, 0, values.nbytes)
        graph = new_graph(memory)
        for one in products:
            expand(graph, one)
        where = buffer_name(buffer).decode()
        return where, size, count, lambda: (compute(backend, graph), silent)

    names = [name for name in CONTENDERS["llama.cpp"] if columns % block_size(codes[name]) == 0]
    found_products = {name: product(codes[name]) for name in names}
    return {f"{name} in {where}": rest for name, (where, *rest) in found_products.items()}


def onnx_products(request: dict[str, Any]) -> Products:
    """MatMulNBits of ONNX Runtime, symmetric, accuracy level 4: inputs in int8."""
    import onnxruntime
    from onnx import TensorProto, helper

    rows, columns, tokens = request["rows"], request["columns"], request["tokens"]
    random = np.random.default_rng(0)
    values = random.standard_normal((tokens, columns)).astype(np.float32)

    def product(group: int) -> tuple[int, int, Callable[[], object]]:
        groups = columns // group
        size = rows * columns // 2 + rows * groups * 4
        count = max(2, request["pool"] // size) if tokens == 1 else 2
        nodes, stored, outputs = [], [], []
        scales = np.full(rows * groups, 0.01, np.float32)
        for number in range(count):
            codes = random.integers(0, 256, (rows, groups, group // 2), np.uint8)
            stored.append(helper.make_tensor(f"w{number}", TensorProto.UINT8, codes.shape, codes.tobytes(), raw=True))
            stored.append(helper.make_tensor(f"s{number}", TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True))
            options = {"K": columns, "N": rows, "bits": 4, "block_size": group, "accuracy_level": 4}
            inputs = ["x", f"w{number}", f"s{number}"]
            nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{number}"], domain="com.microsoft", **options))
            outputs.append(helper.make_tensor_value_info(f"y{number}", TensorProto.FLOAT, [tokens, rows]))
        given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, columns])]
        domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph(nodes, "products", given, outputs, stored)
        model = helper.make_model(graph, opset_imports=domains, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = request["threads"]
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return size, count, lambda: session.run(None, {"x": values})

    return {name: product(int(name.removeprefix("int4-g"))) for name in CONTENDERS["onnxruntime"]}


def openvino_products(request: dict[str, Any]) -> Products:
    """Compressed weights as NNCF writes them: a constant, converted and scaled before the product."""
    import openvino
    from openvino import opset13

    rows, columns, tokens = request["rows"], request["columns"], request["tokens"]
    random = np.random.default_rng(0)
    values = random.standard_normal((tokens, columns)).astype(np.float32)

    def product(name: str) -> tuple[int, int, Callable[[], object]]:
        bits, group = (8, columns) if name == "int8" else (4, int(name.removeprefix("int4-g")))
        groups = columns // group
        size = rows * columns * bits // 8 + rows * groups * 2
        count = max(2, request["pool"] // size) if tokens == 1 else 2
        inputs = opset13.parameter([tokens, columns], dtype=np.float32, name="x")
        outputs, kept = [], []
        kind = openvino.Type.i8 if bits == 8 else openvino.Type.i4
        for _ in range(count):
            data = random.integers(0, 256, rows * columns * bits // 8, np.uint8)
            kept.append(data)  # OpenVINO reads it where it lies
            shape = [rows, groups, group]
            tensor = openvino.Tensor(data.view(np.int8) if bits == 8 else data, openvino.Shape(shape), kind)
            codes = opset13.convert(openvino.op.Constant(tensor), "f16")
            scaled = opset13.multiply(codes, opset13.constant(np.full((rows, groups, 1), 0.01, np.float16)))
            whole = opset13.reshape(scaled, np.array([rows, columns], np.int64), special_zero=False)
            outputs.append(opset13.matmul(inputs, opset13.convert(whole, "f32"), False, True))
        options = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": str(request["threads"])}
        model = openvino.Model(outputs, [inputs], "products")
        run = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
        return size, count, lambda: (run.infer({0: values}, share_inputs=True, share_outputs=True), kept)

    return {name: product(name) for name in CONTENDERS["openvino"]}


def main() -> None:
    answer = sys.stdout
    sys.stdout = sys.stderr  # what tools print must not stand between the answers
    request = json.loads(sys.stdin.readline())
    makers = {"llama.cpp": llama_products, "onnxruntime": onnx_products, "openvino": openvino_products}
    products = makers[request["peer"]](request)
    print(json.dumps({name: size for name, (size, _, _) in products.items()}), file=answer, flush=True)
    for line in sys.stdin:
        _, count, run = products[json.loads(line)]
        start = time.perf_counter()
        run()
        print(json.dumps((time.perf_counter() - start) / count), file=answer, flush=True)


if __name__ == "__main__":
    main()
