"""What `kernels_aot.py` compiles: every Triton kernel in the configurations of its launcher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

ARCHITECTURES = (80, 90, 100)
# and a GPU with less than half the shared memory, for kernels that take much
SMALL = (*ARCHITECTURES, 89)
# instructions an element of the decode loop, for equal steps of keys and values, head_dim 128 and up to 8 query rows
BUDGET = {4: 2.0, 3: 2.9, 2: 1.7}
AXES = ("row", "head", "token")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    # registers that the compiler may give a lane
    most_registers: int | None = None
    # numbers that a lane computes in one turn of the loop; or in the whole program, whose loops take so many turns
    elements: float = 0.0
    turns: float = 0.0
    # bytes that each number is read from
    bytes_each: float = 0.0
    budget: float | None = None
    tensor_cores: bool = True
    architectures: tuple[int, ...] = ARCHITECTURES


def cases() -> Iterator[Case]:
    """Every kernel, as the launchers make them: the common configurations for all targets, the others for some."""
    yield from code_cases()
    yield from dense_cases()
    yield from encoding_cases()
    yield from retention_cases()
    yield from eviction_cases()


def code_cases() -> Iterator[Case]:
    """Decode attention over codes."""
    from hf_kvcache.codecs.codebooks import cubic
    from hf_kvcache.kernels.triton_ops import code_attention
    from hf_kvcache.kernels.triton_ops.codes import packed_book

    types = dict(
        Q="*fp32", BIAS="*fp32", KW="*u16", KT="*u8", KS="*fp16", VW="*u16", VT="*u8", VS="*fp16", WORK="*i32",
        OUT="*fp32", LSE="*fp32", tokens="i32", splits="i32", per="i32", queries="i32", scale="fp32", cap="fp32",
        key_a="fp32", value_a="fp32",
    )  # fmt: skip
    books = [(4, 4, False, False), (4, 4, True, False), (4, 4, True, True), (3, 3, False, False), (3, 3, True, True)]
    books += [(2, 2, False, False), (2, 2, True, True), (4, 2, True, True)]
    shapes = [(128, 8, book) for book in books]
    shapes += [(64, 8, books[0]), (128, 16, books[0]), (128, 32, books[2]), (256, 8, books[2])]
    for dim, columns, (key_bits, value_bits, key_cubic, value_cubic) in shapes:
        key_book, value_book = (
            packed_book(*code_attention.codebook(cubic(dim, bits))[1:]) if curved else 0
            for bits, curved in ((key_bits, key_cubic), (value_bits, value_cubic))
        )
        made = code_attention.configuration(dim, columns, key_bits, key_book, value_bits, value_book)
        warps, stages = made.pop("num_warps"), made.pop("num_stages")
        constants = made | dict(SHIFT=True, CAP=False, RAGGED=True)
        standard = dim == 128 and columns == 8 and not key_cubic and not value_cubic
        common = dim == 128 and columns == 8 and key_bits == value_bits and key_cubic == value_cubic
        kind = {0: "equal steps", 1: "cubic keys", 2: "cubic"}[key_cubic + value_cubic]
        bits = f"{key_bits}" if key_bits == value_bits else f"{key_bits}+{value_bits}"
        yield Case(
            f"code_attention {bits} bits, {kind}, head_dim {dim}, {columns} query rows",
            code_attention.code_attention_kernel, types, constants, warps, stages,
            elements=2 * made["N"] * dim / 32 / warps,
            bytes_each=(key_bits + value_bits) / 16 + 2 / dim,
            budget=BUDGET[key_bits] if standard and key_bits == value_bits else None,
            architectures=ARCHITECTURES if common else (90,),
        )  # fmt: skip


def dense_cases() -> Iterator[Case]:
    """Decode attention over dense keys and values, and what joins partial results."""
    from hf_kvcache.kernels.triton_ops import decode_attention, merge_states, prepare_query

    numbers = [f"{name}_{axis}" for name in "qkv" for axis in ("run", "head", "row")]
    numbers += ["mask_run", "mask_head", "mask_row", "mask_token"]
    for dtype, dim, columns, ragged in [
        ("bf16", 128, 8, True), ("bf16", 64, 8, False), ("bf16", 128, 32, False),
        ("bf16", 256, 8, False), ("fp32", 64, 8, False),
    ]:  # fmt: skip
        made = decode_attention.configuration(dim, dim, columns, 4 if dtype == "fp32" else 2)
        warps, stages = made.pop("num_warps"), made.pop("num_stages")
        types = dict(Q=f"*{dtype}", K=f"*{dtype}", V=f"*{dtype}", MASK="*u8", WORK="*i32", OUT="*fp32", LSE="*fp32")
        types |= dict.fromkeys(("tokens", "heads", "splits", "per", "queries"), "i32")
        types |= dict(scale="fp32", cap="fp32") | dict.fromkeys(numbers, "i32")
        masking = not ragged and columns > 8
        yield Case(
            f"decode_attention {dtype}, head_dim {dim}, {columns} query rows{', ragged' * ragged}{', mask' * masking}",
            decode_attention.dense_kernel, types,
            made | dict(MASKING=masking, CAP=False, RAGGED=ragged, UPCAST=False), warps, stages,
            elements=2 * made["N"] * dim / 32 / warps,
            bytes_each=4 if dtype == "fp32" else 2,
            tensor_cores=dtype != "fp32",
            architectures=ARCHITECTURES if (dtype, dim, columns, ragged) == ("bf16", 128, 8, True) else (90,),
        )  # fmt: skip
    made = prepare_query.configuration(128)
    warps = made.pop("num_warps")
    yield Case(
        "prepare_query bf16, head_dim 128", prepare_query.prepare_kernel,
        dict(Q="*bf16", TURN="*fp32", MEAN="*bf16", OWNERS="*i64", OUT="*fp32", SHIFT="*fp32")
        | dict.fromkeys(("heads", "queries", "last", "q_run", "q_head", "q_row"), "i32"),
        made | dict(MEANS=True, OWNED=True), warps, 1,
    )  # fmt: skip
    yield Case(
        "merge_states bf16, head_dim 128", merge_states.merge_kernel,
        dict(A="*fp32", LSE_A="*fp32", B="*bf16", LSE_B="*fp32", OUT="*bf16", LSE="*fp32", rows="i32"),
        dict(DIM=128, WIDE=128, N=8, UPCAST=False), 4, 1, tensor_cores=False,
    )  # fmt: skip
    yield Case(
        "merge_states of stretches, head_dim 128", merge_states.join_kernel,
        dict(IN="*fp32", IN_LSE="*fp32", RANGES="*i32", OUT="*fp32", LSE="*fp32", splits="i32", queries="i32"),
        dict(DIM=128, WIDTH=merge_states.WIDTH, PARTS=merge_states.PARTS, RAGGED=True), 1, 1, tensor_cores=False,
    )  # fmt: skip


def encoding_cases() -> Iterator[Case]:
    """Encoding of keys and values: prompts of which all is kept, and entries chosen from one."""
    from hf_kvcache.codecs.codebooks import cubic
    from hf_kvcache.codecs.turboquant import KEY_FACTORS, VALUE_FACTORS
    from hf_kvcache.kernels.triton_ops import encode_entries
    from hf_kvcache.kernels.triton_ops.placing import placing

    for dtype, dim, bits, gather, targets in [
        ("bf16", 128, (4, 4), False, (90,)), ("bf16", 128, (4, 4), False, (80, 100)),
        ("bf16", 128, (4, 4), True, (90,)), ("bf16", 128, (3, 3), False, (90,)),
        ("bf16", 128, (2, 2), False, (90,)), ("bf16", 64, (4, 4), False, (90,)),
        ("bf16", 96, (4, 4), True, (90,)), ("bf16", 256, (4, 2), True, (90,)), ("fp32", 128, (4, 4), True, (90,)),
    ]:  # fmt: skip
        made = encode_entries.configuration(dim, *bits, 4 if dtype == "fp32" else 2, targets == (90,))
        warps, stages, registers = made.pop("num_warps"), made.pop("num_stages"), made.pop("maxnreg", None)
        kernel = encode_entries.encode_kernel
        turns = {f"{x}_{name}": f"*{dtype}" for x in ("KEY", "VALUE") for name in ("TURN", "LOW")}
        types = turns | dict(
            K=f"*{dtype}", V=f"*{dtype}", INDEX="*i64", OWNERS="*i64", SHIFT="*fp32",
            KW="*u16", KT="*u8", KS="*fp32", VW="*u16", VT="*u8", VS="*fp32",
        )  # fmt: skip
        whole = ["entries", "tiles", "heads", "tokens", "head_shift", "token_shift", "last_owner"]
        whole += [f"{x}_{axis}" for x in "kv" for axis in AXES]
        types |= dict.fromkeys(whole, "i32") | dict(size="fp32", head_factor="i64", token_factor="i64")
        books = [
            placing(tuple(cubic(dim, width).tolist()), factors)[1:]
            for width, factors in zip(bits, (KEY_FACTORS, VALUE_FACTORS), strict=True)
        ]
        constants = made | dict(KEY_BOOK=books[0], VALUE_BOOK=books[1], GATHER=gather, FLAT=not gather)
        constants |= dict(OWNED=True, CENTER=True, EXACT=dim & (dim - 1) == 0, UPCAST=False)
        yield Case(
            f"encode_entries {dtype}, {'+'.join(map(str, bits))} bits, head_dim {dim}{', chosen' if gather else ''}",
            kernel, types, constants, warps, stages, registers,
            elements=2 * made["N"] * dim / 32 / warps, turns=max(1, made["ROWS"] // made["STEP"]),
            architectures=targets,
        )  # fmt: skip


def retention_cases() -> Iterator[Case]:
    """Gated retention, chunk by chunk and token by token. An element is one number of a token's value."""
    from hf_kvcache.kernels.triton_ops import gated_retention

    strides = [f"{name}_{axis}" for name in ("q", "k", "v") for axis in ("run", "head", "row")]
    gates = ["decay_run", "decay_head", "decay_row"]
    for dtype, dim, value_dim, targets in [
        ("bf16", 128, 128, ARCHITECTURES), ("bf16", 64, 64, (90,)), ("bf16", 64, 128, (90,)),
        ("bf16", 128, 64, (90,)), ("bf16", 256, 256, (80, 90)), ("bf16", 80, 40, (90,)),
        ("fp16", 128, 128, (80, 90)), ("fp32", 64, 64, (80, 90)), ("fp32", 128, 128, (90,)),
        ("fp32", 256, 256, (89, 90, 100)),
    ]:  # fmt: skip
        held = dict(Q=f"*{dtype}", K=f"*{dtype}", V=f"*{dtype}", START="*fp32", OUT=f"*{dtype}", LAST="*fp32")
        held |= dict.fromkeys((*strides, "heads", "length"), "i32")
        more = dict(GATES="*fp32", FOUND="*fp32", FADED="*fp32") | dict.fromkeys(("chunks", "per", "parts"), "i32")
        for target in targets:
            made = gated_retention.configuration(dim, value_dim, DTYPES[dtype], target in (90, 100))
            warps, stages = made.pop("num_warps"), made.pop("num_stages")
            for output in (True, False):
                yield Case(
                    f"gated_retention {dtype}, heads of {dim} and {value_dim}, {'outputs' if output else 'states'}",
                    gated_retention.chunk_kernel, held | more,
                    made | dict(OUTPUT=output, STATE=output, UPCAST=False), warps, stages,
                    elements=made["N"] * made["COLUMNS"] / 32 / warps,
                    tensor_cores=dtype != "fp32", architectures=(target,),
                )  # fmt: skip
        if targets != ARCHITECTURES:
            continue
        made = gated_retention.step_configuration(dim, value_dim)
        warps = made.pop("num_warps")
        yield Case(
            f"gated_retention {dtype}, heads of {dim} and {value_dim}, one token", gated_retention.step_kernel,
            held | dict(DECAY="*fp32") | dict.fromkeys(gates, "i32"), made | {"STATE": True}, warps, 1,
            tensor_cores=False, architectures=(90,),
        )  # fmt: skip
    yield Case(
        "gated_retention, sums of gates", gated_retention.gates_kernel,
        dict(DECAY="*fp32", GATES="*fp32") | dict.fromkeys((*gates, "heads", "length", "chunks"), "i32"),
        dict(N=64, MANY=gated_retention.MANY), 4, 1, tensor_cores=False, architectures=(90,),
    )  # fmt: skip


def eviction_cases() -> Iterator[Case]:
    """Scores, norms and selection. The loops of the window scores hold the mask of the last tiles beside what runs for
    all others, so that their count is about half as much again as what is run."""
    from hf_kvcache.kernels.triton_ops import select, value_norm, window_scores

    group, window = 4, 64
    for dtype, dim in (("bf16", 128), ("fp32", 64)):
        made = window_scores.configuration(dim, group, window, 4 if dtype == "fp32" else 2)
        warps, stages = made.pop("num_warps"), made.pop("num_stages")
        numbers = ["tokens", "heads", "group", "window", "pieces", "per", "k_run", "k_head", "k_row"]
        types = dict(Q=f"*{dtype}", K=f"*{dtype}", LSE="*fp32", scale="fp32", cap="fp32")
        types |= dict.fromkeys(numbers, "i32")
        for name, kernel, more, constants in (
            ("log-sum-exp", window_scores.lse_kernel, {}, {}),
            ("scores", window_scores.window_scores_kernel, {"OUT": "*fp32"}, {"JOINED": window_scores.JOINED}),
        ):
            yield Case(
                f"window_scores {dtype}, head_dim {dim}, {name}", kernel, types | more,
                made | constants | dict(CAP=False, UPCAST=False), warps, stages,
                elements=made["ROWS"] * made["TOKENS"] / 32 / warps, tensor_cores=dtype != "fp32",
                architectures=SMALL if (dtype, dim) == ("bf16", 128) else (90,),
            )  # fmt: skip
    for dtype, dim, gram, targets in (
        ("bf16", 128, True, SMALL), ("bf16", 128, False, SMALL), ("bf16", 256, True, (90,)),
        ("bf16", 256, False, (89,)), ("fp32", 64, False, (89, 90)), ("fp32", 128, True, (90, 100)),
    ):  # fmt: skip
        itemsize = 4 if dtype == "fp32" else 2
        held = dict(V=f"*{dtype}", WEIGHT="*fp32" if gram else f"*{dtype}", OUT="*fp32")
        held |= dict.fromkeys(["tokens", "heads", "group", "v_run", "v_head", "v_row"], "i32")
        if gram:
            kernel, made = value_norm.gram_norm_kernel, value_norm.gram_configuration(dim, group, itemsize)
            held["per"], columns = "i32", made["MEMBERS"] * dim
        else:
            kernel, made = value_norm.sum_norm_kernel, value_norm.sum_configuration(dim, itemsize)
            made["WIDTH"], columns = 4096, made["COLUMNS"]
        warps, stages = made.pop("num_warps"), made.pop("num_stages")
        yield Case(
            f"value_norm {dtype}, head_dim {dim}, {'L2' if gram else 'L1'}", kernel, held, made | dict(UPCAST=False),
            warps, stages, elements=made["TOKENS"] * columns / 32 / warps, tensor_cores=dtype != "fp32",
            architectures=targets,
        )  # fmt: skip
    scored = dict(SCORE="*fp32", COUNTS="*i64", tokens="i32")
    made = select.row_configuration(8192)
    warps = made.pop("num_warps")
    yield Case(
        "select, a row of 8192", select.row_kernel, scored | dict(OUT="*u8"), made, warps, 1,
        elements=made["WIDE"] / 32 / warps, turns=32, tensor_cores=False,
    )  # fmt: skip
    made = select.configuration(16)
    warps = made.pop("num_warps")
    split = scored | dict(HISTOGRAM="*i32", FOUND="*i32", per="i32")
    for name, kernel, more, constants in (
        ("first digit", select.count_kernel, {}, {"TURN": 0}),
        ("third digit", select.count_kernel, {}, {"TURN": 2}),
        ("mask", select.mask_kernel, {"OUT": "*u8"}, {}),
    ):
        yield Case(
            f"select, 16 splits, {name}", kernel, split | more, made | constants, warps, 1,
            elements=select.TILE / 32 / warps, tensor_cores=False,
            architectures=ARCHITECTURES if name == "third digit" else (90,),
        )  # fmt: skip
