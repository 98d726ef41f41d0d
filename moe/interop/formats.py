"""Weights in few bytes, as Hugging Face's files hold them: the tensors that stand for NAME, a matrix [outputs, inputs].

    fp8     NAME  F8_E4M3 and NAME_scale_inv, the float32 factor of each 128 x 128 block: DeepSeek's own files
    mxfp4   NAME_packed  U8 [outputs, inputs / 2], the even input's E2M1 code in the low nibble, and
            NAME_scale  U8 [outputs, inputs / 32], the exponent of two plus 127: `mxfp4-pack-quantized` of
            compressed-tensors (its compressors/mxfp4/base.py), the layout of moonshotai/Kimi-K3

`moe.ops.weights` rounds to both and says what they mean.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moe.errors import UserError
from moe.interop.names import Tensor
from moe.interop.shards import DTYPES, EXPONENT, FLOATS, Stored
from moe.ops import weights
from moe.ops.fp8 import BLOCKS
from moe.validation import MOST_EXPERTS

SCALE_INV, PACKED, SCALE = '_scale_inv', '_packed', '_scale'
BLOCK, GROUP = BLOCKS[0], weights.GROUP
# The tensors of each kind: what is behind the name, how many inputs and outputs share a value, its dtype.
PARTS = {
  'fp8': (('', 1, 1, 'F8_E4M3'), (SCALE_INV, BLOCK, BLOCK, 'F32')),
  'mxfp4': ((PACKED, 2, 1, 'U8'), (SCALE, GROUP, 1, 'U8')),
}
# Of each dtype: its bits without the sign, and the least of them that is no finite number.
BITS = {
  np.dtype(np.float32): (np.uint32, 0x7FFFFFFF, 0x7F800000),
  np.dtype(np.float16): (np.uint16, 0x7FFF, 0x7C00),
  np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7FFF, 0x7F80),
  np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, 0x7F, 0x7F),
  np.dtype(np.uint8): (np.uint8, 0xFF, 0xFF),
}
# Experts of a layer in one tensor [experts, outputs, inputs], gate above up, as transformers 5 holds them.
FUSED = re.compile(rf'(.*\.mlp\.experts)\.(gate_up|down)_proj({SCALE_INV}|{PACKED}|{SCALE})?')
# The value of each code.
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
E8M0 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)


def kind_for(tensor: Tensor, quantize: str | None) -> str | None:
  """How an export with --quantize writes this tensor: a kind, or None for the plain dtype.

  fp8 as DeepSeek: all projections, but not embedding, head, router, norms and what joins hidden state and embedding
  before an MTP module. mxfp4: the routed experts; compressed-tensors has other names for scales of FP8 blocks, which
  only some readers mix, so the rest stays plain.
  """
  chosen = {None: False, 'fp8': tensor.is_projection, 'mxfp4': tensor.is_expert}[quantize]
  return quantize if chosen else None


def described(
  name: str, shape: tuple[int, ...], dtype: str, kind: str | None
) -> dict[str, tuple[str, tuple[int, ...]]]:
  """Tensors that stand for `name` of `shape`: safetensors' dtype and shape of each. Raises UserError if none can.

  Args:
    name: of the tensor.
    shape: [outputs, inputs], or of any number of axes if `kind` is None.
    dtype: safetensors' name of the plain one, such as 'BF16'; quantised tensors have their own.
    kind: 'fp8', 'mxfp4' or None, as `kind_for` says.
  """
  if kind is None:
    return {name: (dtype, shape)}
  outputs, inputs = shape
  if kind == 'mxfp4' and inputs % GROUP:
    raise UserError(f'{name} of shape {list(shape)} cannot be MXFP4: its inputs must be a multiple of {GROUP}')
  return {
    name + suffix: (stored_as, (-(-outputs // per_output), -(-inputs // per_input)))
    for suffix, per_input, per_output, stored_as in PARTS[kind]
  }


def encode(name: str, value: np.ndarray, dtype: str, kind: str | None) -> dict[str, np.ndarray]:
  """The tensors of `described`, rounded from `value`.

  Args:
    name, dtype, kind: as of `described`.
    value: floats of the tensor's shape.
  """
  if kind is None:
    return {name: value.astype(DTYPES[dtype], copy=False)}
  rounded = _quantize(np.ascontiguousarray(value.T), kind)
  parts = zip(PARTS[kind], rounded, strict=True)
  return {name + suffix: np.ascontiguousarray(np.asarray(leaf).T) for (suffix, *_), leaf in parts}


@functools.partial(jax.jit, static_argnames='kind')
def _quantize(w_KN, kind):
  return weights.quantize(jnp.asarray(w_KN), kind)


def unified(stored: dict[str, Stored]) -> dict[str, Stored]:
  """The same tensors as DeepSeek's files name and describe them: experts one by one, MXFP4's exponents as U8.

  Raises:
    UserError: experts in one tensor, whose halves cannot be told apart.
  """
  found: dict[str, Stored] = {}
  for name, one in stored.items():
    experts = one.shape[0] if len(one.shape) == 3 and 0 not in one.shape and one.dtype in DTYPES else 0
    fused = FUSED.fullmatch(name) if 0 < experts <= MOST_EXPERTS else None
    found |= _experts(one, *fused.groups('')) if fused else {name: one}
  for name, one in found.items():
    if one.dtype == EXPONENT and name.removesuffix(SCALE) + PACKED in found:
      found[name] = one._replace(dtype='U8')
  return found


def _experts(fused, prefix, kind, suffix):
  """The parts of a tensor of all experts of a layer, which lie there one after the other."""
  kinds = ('gate', 'up') if kind == 'gate_up' else (kind,)
  experts, outputs, inputs = fused.shape
  rows = outputs // len(kinds)
  if outputs % len(kinds) or (len(kinds) > 1 and fused.dtype == 'F8_E4M3' and rows % BLOCK):
    raise UserError(f'{fused.file}: {prefix}.{kind}_proj{suffix} has {outputs} rows, which are no two whole halves')
  bytes_each = rows * inputs * np.dtype(DTYPES[fused.dtype]).itemsize
  return {
    f'{prefix}.{expert}.{one}_proj.weight{suffix}': fused._replace(
      shape=(rows, inputs), start=fused.start + (expert * len(kinds) + half) * bytes_each
    )
    for expert in range(experts)
    for half, one in enumerate(kinds)
  }


def kind_of(stored: dict[str, Stored], name: str) -> str | None:
  """How the files hold `name`: a kind, or None for plain floats."""
  if name + PACKED in stored:
    return 'mxfp4'
  return 'fp8' if stored[name].dtype == 'F8_E4M3' else None


def _values_of(stored, name) -> Stored:
  """The tensor with the values of `name`, which may have its scales in another one."""
  return stored[name] if name in stored else stored[name + PACKED]


def base(name: str) -> str:
  """`name` without what a second tensor of a weight has behind it."""
  suffix = next((end for end in (SCALE_INV, PACKED, SCALE) if name.endswith(end)), '')
  return name.removesuffix(suffix)


def check(name: str, stored: dict[str, Stored], shape: tuple[int, ...]) -> None:
  """Checks that the files hold `name` with `shape` in a way that `read` understands. Raises UserError."""
  kind, found = kind_of(stored, name), _values_of(stored, name)
  if kind and len(shape) != 2:
    raise UserError(f'{found.file}: {name} is {found.dtype} and must be one of {", ".join(FLOATS)}')
  if kind != 'mxfp4':
    if found.shape != shape:
      raise UserError(f'{found.file}: {name} has shape {list(found.shape)} and must have {list(shape)}')
    if found.dtype not in FLOATS and kind is None:
      raise UserError(f'{found.file}: {name} is {found.dtype} and must be one of {", ".join(FLOATS)}, F8_E4M3')
  wanted = described(name, shape, found.dtype, kind)
  for suffix in ('', SCALE_INV, PACKED, SCALE):
    if name + suffix in stored and name + suffix not in wanted:
      extra = stored[name + suffix]
      raise UserError(f'{extra.file}: {name + suffix} does not belong to a weight of {kind or found.dtype}')
  for part, (dtype, size) in wanted.items():
    if part not in stored:
      raise UserError(f'{found.file}: {name} is {kind} and {part} is missing')
    have, floats = stored[part], dtype == 'F32' and stored[part].dtype in (*FLOATS, EXPONENT)
    if have.shape != size or not (have.dtype == dtype or floats):
      raise UserError(f'{have.file}: {part} is {have.dtype} {list(have.shape)} and must be {dtype} {list(size)}')


def read(stored: dict[str, Stored], name: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
  """Values of a tensor that `check` passed, as they are or dequantised to float32: [rows, columns].

  Args:
    stored: the folder's tensors, by name.
    name: of the tensor.
    rows, columns: indices; a vector is one column. Only what they name is read from the disk.

  Raises:
    UserError: a number is not finite.
  """
  kind = kind_of(stored, name)
  if kind == 'mxfp4':
    byte = _take(stored[name + PACKED], rows, columns // 2)
    code = np.where(columns % 2, byte >> 4, byte & 15)
    value = E2M1[code] * E8M0[_take(stored[name + SCALE], rows, columns // GROUP)]
  else:
    value = _take(stored[name], rows, columns)
  if kind == 'fp8':
    scale = _take(stored[name + SCALE_INV], rows // BLOCK, columns // BLOCK)
    with np.errstate(over='ignore'):
      value = value.astype(np.float32) * scale.astype(np.float32)
  check_finite(value, _values_of(stored, name).file, name)
  return value


def check_finite(values: np.ndarray, file: Path, name: str) -> None:
  """Refuses NaN and infinities, from which no model speaks. Raises UserError.

  Args:
    values: floats as the files hold them, or uint8 codes of exponents.
    file, name: where they stand.
  """
  kind, mask, least = BITS[values.dtype]
  # By their bits: of 16-bit floats, numpy asks one after the other.
  if values.size and (values.view(kind) & kind(mask)).max() >= least:
    raise UserError(f'{file}: {name} holds a number that is not finite (NaN or infinity)')


def _take(stored, rows, columns):
  matrix = stored.read()
  matrix = matrix.reshape(len(matrix), -1)
  return np.asarray(matrix[_span(rows)][:, _span(columns)])


def _span(index):
  """Consecutive indices as a slice, which reads no more than it must and copies nothing."""
  first, last = int(index[0]), int(index[-1])
  is_span = last - first + 1 == len(index) and (np.diff(index) == 1).all()
  return slice(first, last + 1) if is_span else index
