"""Makes a corpus of Python source from wheels: the same text on every machine, since packages and versions are pinned.

pip download --no-deps --only-binary=:all: --platform=any --python-version=3.11 -d wheels -r configs/sweeps/corpus.txt
moe python_corpus --wheels=wheels --out=corpus

Takes the *.py files of each wheel in order of their sha256, each text once, until the package has its share. Writes
OUT/PACKAGE/PATH for --config.data.paths=OUT.
"""

import hashlib
import pathlib
import zipfile
import zlib

import tqdm
from absl import flags

from moe.data.corpus import text_problem
from moe.errors import UserError
from moe.files.folder import new_folder
from moe.files.paths import local_path

WHEELS = flags.DEFINE_string('wheels', None, 'Folder of wheels.')
OUT = flags.DEFINE_string('out', None, 'Folder to write, which must not exist yet.')
MAX_KB = flags.DEFINE_integer(
  'max_kb', 30, 'Leave out larger files, in 1000 bytes: a few of them would be much of a validation set.', lower_bound=1
)
MAX_PACKAGE_MB = flags.DEFINE_integer(
  'max_package_mb', 5, 'Text of one package at most, in 10^6 bytes, so that none has much weight.', lower_bound=1
)
MIN_BYTES = 64


def main(argv):
  if argv[1:] or not WHEELS.value or not OUT.value:
    raise UserError('usage: moe python_corpus --wheels=DIR --out=DIR')
  wheels = sorted(local_path(WHEELS.value, '--wheels').glob('*.whl'))
  if not wheels:
    raise UserError(f'--wheels = {WHEELS.value!r} is no folder with wheels (*.whl)')
  out = local_path(OUT.value, '--out')
  if out.exists():
    raise UserError(f'--out = {OUT.value!r} exists; choose another folder or delete it')
  plan = {'wheels': [wheel.name for wheel in wheels], 'max_kb': MAX_KB.value, 'max_package_mb': MAX_PACKAGE_MB.value}
  seen: set[bytes] = set()
  written = 0
  with new_folder(out, plan) as partial:
    for wheel in tqdm.tqdm(wheels, unit='package'):
      for digest, name, text in _chosen(wheel, seen):
        seen.add(digest)
        file = partial / wheel.name.split('-')[0] / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text)
        written += len(text)
    if not seen:
      raise UserError(f'the {len(wheels)} wheels in {WHEELS.value!r} hold no *.py file of {MIN_BYTES} bytes or more')
  print(f'{out}: {len(seen)} files of {len(wheels)} packages, {written / 1e6:.1f} MB')


def _chosen(wheel: pathlib.Path, seen: set[bytes]) -> list[tuple[bytes, str, bytes]]:
  """(digest, path, text) of a package's share of the files whose digests are not in `seen`."""
  found: dict[bytes, tuple[str, bytes]] = {}  # digest -> (path, text)
  try:
    with zipfile.ZipFile(wheel) as opened:
      for info in opened.infolist():
        path = pathlib.PurePosixPath(info.filename)
        if path.suffix != '.py' or path.is_absolute() or '..' in path.parts:
          continue
        if MIN_BYTES <= info.file_size <= MAX_KB.value * 1000:
          text = opened.read(info)
          found.setdefault(hashlib.sha256(text).digest(), (info.filename, text))
  except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:  # the last: encrypted, unknown
    raise UserError(f'cannot read wheel {str(wheel)!r}: {error}') from error
  chosen, room = [], MAX_PACKAGE_MB.value * 10**6
  for digest, (name, text) in sorted(found.items()):
    room -= len(text)
    if room < 0:
      break
    if digest not in seen and text_problem(text) is None:
      chosen.append((digest, name, text))
  return chosen
