"""Exported programs (``.pt2``), checked before torch opens them.

``torch.export.load`` unpickles what it finds, imports modules that a file names, and runs its graph as Python text. A
program is therefore read member by member, checked, and handed to torch as the copy that was checked:

- members are plain tensors and JSON, stored uncompressed, of bounded number and size;
- every operator is on a list of functional ones, which compute tensors from tensors and touch no file;
- every name is made of letters, digits, dots and underscores, every size and guard is arithmetic, inputs and outputs
  are tuples, lists and dicts;
- what describes the source code (stack traces) is left out.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterable
from typing import Any

import torch

from stepdistill.files.reading import parse_json
from stepdistill.loading.settings import values_by_key

SAMPLE = "data/sample_inputs/model.pt"
GRAPH = "models/model.json"
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|data/weights/weight_\d+|data/constants/tensor_\d+|"
    + "|".join(re.escape(name) for name in (SAMPLE, GRAPH, *CONFIGS))
)
MAX_MEMBERS, MAX_BYTES, MAX_SAMPLE = 100_000, 32 * 2**30, 2**28
"""Limits of an archive: members, bytes in all, and bytes of its example images."""

ARITHMETIC = re.compile(
    r"(L\['\w+'\]\.size\(\)\[\d\]|Symbol|Integer|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|"
    r"ModularIndexing|Eq|Ne|positive|nonnegative|integer|True|False|and|or|not|[-+*/%(),=<>!' \dsu])*"
)
NAME = re.compile(r"[\w.]*")
TEXTS = {
    "expr_str": (ARITHMETIC, "arithmetic"),
    "guards_code": (ARITHMETIC, "arithmetic"),
    "as_string": (re.compile(r"[^\"'\\\x00-\x1f\x7f]{0,500}"), "plain text"),
    "torch_version": (re.compile(r"[\w.+]*"), "a version"),
}
"""Texts that are more than a name, by their key: what they may be, and how that is called."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PURE = _words(
    """
    _assert_scalar _assert_tensor_metadata _log_softmax _softmax _to_copy _unsafe_view abs acos acosh
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d add addcdiv addcmul addmm
    alias all amax amin aminmax any arange argmax argmin asin asinh atan atan2 atanh avg_pool1d avg_pool2d baddbmm
    batch_norm bitwise_and bitwise_not bitwise_or bmm cat ceil celu channel_shuffle chunk clamp clamp_max
    clamp_min clone concat constant_pad_nd contiguous conv1d conv2d conv_transpose2d convolution cos cosh cumprod
    cumsum detach diagonal div dot dropout einsum elu embedding empty_like eq erf erfc exp expand expand_as expm1
    eye feature_dropout flatten flip floor floor_divide fmod full full_like gather ge gelu glu group_norm gt
    hardshrink hardsigmoid hardswish hardtanh im2col index index_select instance_norm interpolate isfinite isinf
    isnan layer_norm le leaky_relu lerp lift_fresh_copy linalg_norm linalg_vector_norm linear linspace log log10
    log1p log2 log_sigmoid log_softmax logaddexp logical_and logical_not logical_or logsumexp lt masked_fill
    matmul max max_pool1d max_pool2d max_pool2d_with_indices maximum mean meshgrid min minimum mish mm movedim mul
    mv narrow native_batch_norm native_dropout native_group_norm native_layer_norm ne neg new_empty new_full
    new_ones new_zeros norm numpy_T one_hot ones ones_like pad permute pixel_shuffle pixel_unshuffle pow prelu
    prod reciprocal reflection_pad1d reflection_pad2d relu relu6 remainder repeat repeat_interleave
    replication_pad1d replication_pad2d reshape rms_norm roll round rsqrt rsub scalar_tensor
    scaled_dot_product_attention select selu sigmoid sign silu sin sinh slice softmax softplus softshrink split
    split_with_sizes sqrt square squeeze stack std std_mean sub sum sym_numel sym_size sym_storage_offset
    sym_stride t tan tanh tensor_split threshold tile to topk transpose tril triu true_divide trunc type_as unbind
    unflatten unfold unsafe_chunk unsafe_split unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d
    upsample_nearest1d upsample_nearest2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa upsample_nearest_exact2d
    _upsample_nearest_exact2d var var_mean view view_as where zeros zeros_like
    """
)
"""Operators of aten that compute tensors from tensors, and views of tensors."""
IN_PLACE = _words(
    """
    add_ clamp_ clamp_min_ clamp_max_ div_ dropout_ elu_ celu_ selu_ hardsigmoid_ hardswish_ hardtanh_ leaky_relu_
    masked_fill_ mish_ mul_ relu_ relu6_ sigmoid_ silu_ sub_ tanh_ threshold_
    """
)
"""Operators that write to a tensor of the program: harmless, since the tensors lie in memory and in no file."""
ON_SIZES = _words(
    """
    add sub mul floordiv mod truediv pow neg pos eq ne lt le gt ge and_ or_ not_ getitem
    """
)
"""Functions of ``operator`` on sizes."""
TARGET = re.compile(r"torch\.ops\.aten\.(?P<aten>\w+)\.\w+|_operator\.(?P<size>\w+)|torch\.(?P<sym>sym_\w+)")
SYM = frozenset(["sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sqrt", "sym_sum"])
FORBIDDEN = frozenset(["as_graph", "as_custom_obj", "as_operator", "custom_obj", "token"])
"""Kinds of arguments that are no tensors, numbers or plain texts."""
CONTAINERS = frozenset([None, "builtins.tuple", "builtins.list", "builtins.dict"])


DAMAGE = (RuntimeError, AssertionError, LookupError, TypeError, AttributeError, SyntaxError, ValueError)
"""What torch raises for a graph that does not fit its tensors."""


def load_program(path: str) -> torch.export.ExportedProgram:
    """Return the program in a file.

    Raises:
        ValueError: if there is none, or it holds more than tensors and a graph of known operators.
    """
    try:
        content = _checked_copy(path)
    except OSError as error:
        raise ValueError(f"features {path!r}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"features {path!r}: expected a program of torch.export.save: {error}") from error
    try:
        return torch.export.load(content)
    except DAMAGE as error:
        raise ValueError(f"features {path!r}: torch cannot open it: {error}") from error


def _checked_copy(path: str) -> io.BytesIO:
    """Return an archive as torch gets it: every member has been read once and checked."""
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
        members = _check_members(f"features {path!r}", source.infolist())
        for inside, member in members.items():
            data, where = source.read(member), f"features {path!r}: {inside}"
            if inside == SAMPLE:
                _check_sample(where, data)
            elif inside in CONFIGS:
                _check_weights(where, data, sum(other.file_size for other in members.values()))
            elif inside == GRAPH:
                data = _checked_graph(where, data)
            target.writestr(member, data)
    if GRAPH not in members:
        raise KeyError(f"there is no {GRAPH}")
    copy.seek(0)
    return copy


def _check_members(where: str, archive: Iterable[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Return the members of an archive by their names inside its folder, if all are known, unique and not too large."""
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive:
        inside = member.filename.partition("/")[2]
        if inside in members or not MEMBERS.fullmatch(inside):
            strange = member.filename if inside not in members else "two members of one name"
            raise ValueError(f"{where}: expected tensors and a graph, as a newer torch writes them, got {strange}")
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{where}: {inside}: expected an uncompressed member, as torch writes it")
        members[inside] = member
    size = sum(member.file_size for member in members.values())
    if len(members) > MAX_MEMBERS or size > MAX_BYTES or SAMPLE in members and members[SAMPLE].file_size > MAX_SAMPLE:
        raise ValueError(f"{where}: {len(members):,} members of {size:,} bytes are more than a program has")
    return members


def _check_sample(where: str, data: bytes) -> None:
    """Raise ``ValueError`` if the example images are more than tensors."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        if any(member.compress_type != zipfile.ZIP_STORED for member in file.infolist()):
            raise ValueError(f"{where}: expected uncompressed tensors")
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{where}: expected tensors, got pickled objects") from error


def _check_weights(where: str, data: bytes, size: int) -> None:
    """Raise ``ValueError`` if the description of the weights names more than tensors, or more than ``size`` numbers."""
    config = _parse(where, data)
    _check_names(where, config)
    for key, value in values_by_key(config):
        if key == "use_pickle" and value:
            raise ValueError(f"{where}: expected plain tensors, got pickled ones")
        if key == "sizes" and math.prod(length["as_int"] for length in value) > size:
            raise ValueError(f"{where}: expected tensors that fit into {size:,} bytes, got a larger one")


def _checked_graph(where: str, data: bytes) -> bytes:
    """Return the JSON of a graph without what describes its source code."""
    graph = _parse(where, data)
    for node in graph["graph_module"]["graph"]["nodes"]:
        _check_target(where, str(node["target"]))
        node["metadata"] = {}
    graph["graph_module"]["metadata"] = {}
    _check_names(where, graph)
    return json.dumps(graph).encode()


def _parse(where: str, data: bytes) -> dict[str, Any]:
    return parse_json(data.decode(errors="replace"), where, dict[str, Any])


def _check_target(where: str, target: str) -> None:
    """Raise ``ValueError`` unless a node calls a known operator."""
    found = TARGET.fullmatch(target)
    known = found and (found["aten"] in PURE | IN_PLACE or found["size"] in ON_SIZES or found["sym"] in SYM)
    if not known:
        raise ValueError(
            f"{where}: expected operators of aten that compute tensors from tensors, got {target[:80]!r}; write the "
            "network without it, or use a folder of a transformers vision model"
        )


def _check_names(where: str, tree: Any) -> None:
    """Raise ``ValueError`` if a key or text is not what torch writes there."""
    for key, value in values_by_key(tree):
        if key in FORBIDDEN and value or key == "treespec_namedtuple_fields" and value:
            raise ValueError(f"{where}: {key}: expected tensors and numbers, got {str(value)[:80]!r}")
        if not NAME.fullmatch(key):
            raise ValueError(f"{where}: expected a name of letters, digits, dots and underscores, got {key[:80]!r}")
        for text in value if type(value) is list else [value]:
            if type(text) is str:
                _check_text(where, key, text)


def _check_text(where: str, key: str, text: str) -> None:
    if key in ("in_spec", "out_spec"):
        _check_structure(where, key, text)
        return
    pattern, expected = TEXTS.get(key, (NAME, "a name of letters, digits, dots and underscores"))
    if key != "target" and not pattern.fullmatch(text):  # targets are checked node by node
        raise ValueError(f"{where}: {key}: expected {expected}, got {text[:80]!r}")


def _check_structure(where: str, key: str, text: str) -> None:
    """Raise ``ValueError`` unless inputs or outputs are tuples, lists and dicts: other kinds import modules."""
    if not text:
        return
    for name, value in values_by_key(parse_json(text, f"{where}: {key}", list[Any])):
        if name == "type" and value not in CONTAINERS:
            raise ValueError(f"{where}: {key}: expected tuples, lists and dicts, got {str(value)[:80]!r}")
