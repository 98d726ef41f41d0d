"""The processes of one run: that they find each other, do the same, and say who is lost.

Before JAX joins them, they meet in the plain: process 0 listens at mesh.coordinator, the others connect, and each
says who it is and what it is about to run. Process 0 compares and answers; then JAX gets the port, and the
connections stay. The system closes them when a process dies, however it dies, so that the others can name it and end
at once, where a collective would hang or end in a native traceback. Not noticed here: a process that hangs or is
stopped, and, for KEEP_ALIVE's time, a host or a network that is gone.
"""

import contextlib
import hashlib
import json
import os
import platform
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import moe
from moe.config import MeshConfig
from moe.errors import UserError

KEEP_ALIVE = {'TCP_KEEPIDLE': 10, 'TCP_KEEPINTVL': 5, 'TCP_KEEPCNT': 6}  # a silent host is lost after 40 s
MOST_BYTES = 1 << 20  # of a message
TRIES_S = 0.2  # between attempts to connect
WORD_S = 2.0  # for a word that should come at once


class Peers:
  """The other processes of a run, as one of them sees them: process 0 all of them, the others process 0."""

  def __init__(self, process_id: int = 0, connections: dict[int, '_Connection'] | None = None):
    self._id, self._connections, self._ended = process_id, connections or {}, False
    threads = [threading.Thread(target=self._listen, args=(peer,), daemon=True) for peer in self._connections.values()]
    self._threads = threads
    for thread in threads:
      thread.start()

  def agree(self, facts: dict) -> None:
    """Returns once every process has called this, with the same facts.

    Args:
      facts: JSON values by name.

    Raises:
      UserError: naming the first fact that differs, on every process.
    """
    if self._id:
      (hub,) = self._connections.values()
      hub.send({'facts': facts})
      answer = hub.inbox.get()  # as `_listen` passes it on
    else:
      theirs = {peer.id: peer.inbox.get()['facts'] for peer in self._connections.values()}
      answer = {'error': _difference(facts, theirs)}
      self._ended = bool(answer['error'])  # first: the others end as soon as they hear of it
      self._tell(answer)
    if answer['error']:
      raise UserError(answer['error'])

  def leave(self, error: str = '') -> None:
    """Says goodbye: that this process needs the others no more, or the error that it ends with."""
    if self._connections and not self._ended:
      if error:
        time.sleep(WORD_S)  # it may follow from the loss of another process, which `_listen` then hears of
      self._ended = True
      self._tell({'bye': f'process {self._id}: {error}' if error else ''})
    for peer in self._connections.values():
      peer.hang_up()
    for thread in self._threads:
      thread.join()
    for peer in self._connections.values():
      peer.close()

  def _tell(self, message):
    for peer in self._connections.values():
      with contextlib.suppress(OSError):  # one that is gone is noticed where it is listened to
        peer.send(message)

  def _listen(self, peer: '_Connection'):
    """Passes on what a peer says, until it says goodbye; ends this process if the peer is lost or has failed."""
    while True:
      try:
        message = peer.receive()
      except (OSError, ValueError):
        message = {'bye': f'{peer.name} of the run is gone; the same command on all processes continues the run'}
      if 'bye' not in message:
        self._ended |= bool(message.get('error'))  # before process 0 can end
        peer.inbox.put(message)
        continue
      if message['bye'] and not self._ended:
        self._tell({'bye': message['bye']})
        _end(message['bye'])
      return


class _Connection:
  """A process at the other end of a socket. Messages are lines of JSON."""

  def __init__(self, sock: socket.socket, process_id: int, name: str, reader=None):
    self.id, self.name = process_id, name
    self.inbox: queue.Queue[dict] = queue.Queue()
    self._socket, self._reader = sock, reader or sock.makefile('rb')
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEP_ALIVE.items():
      if hasattr(socket, option):
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

  def send(self, message: dict) -> None:
    self._socket.sendall(json.dumps(message).encode() + b'\n')

  def hang_up(self) -> None:
    """Ends the connection, and a `receive` that waits in another thread."""
    with contextlib.suppress(OSError):  # the other end did
      self._socket.shutdown(socket.SHUT_RDWR)

  def close(self) -> None:
    self._reader.close()
    self._socket.close()

  def receive(self) -> dict:
    """The next message. Raises ValueError at the end of the connection or if it is none, OSError."""
    return _message(self._reader)


@contextlib.contextmanager
def joined(mesh: MeshConfig, facts: dict, say: Callable[[str], None]) -> Iterator[Peers]:
  """The processes of a run, met and of one mind about `facts`; they part at the end of the block.

  Raises:
    UserError: no host:port, a port that is taken, a host that cannot be reached, a process that does not come within
      mesh.start_timeout_s, two with the same number; or other facts, naming one of them.
  """
  if mesh.num_processes == 1:
    yield Peers()
    return
  facts = facts | {'mesh.num_processes': mesh.num_processes, 'the code': code_digest()}
  address = _address(mesh.coordinator)
  if mesh.process_id == 0:
    say(f'waiting at {mesh.coordinator} for the other processes of {mesh.num_processes}')
  peers = Peers(mesh.process_id, _visit(mesh, address) if mesh.process_id else _receive_all(mesh, address))
  try:
    peers.agree(facts)
    yield peers
    peers.leave()
  except BaseException as error:
    what = str(error) if isinstance(error, UserError) else f'{type(error).__name__} {error}'
    peers.leave(' '.join(what.split())[:300])
    raise


def code_digest() -> str:
  """Of this package's source."""
  digest, folder = hashlib.sha256(), Path(moe.__file__).parent
  for file in sorted(folder.rglob('*.py')):
    digest.update(f'{file.relative_to(folder)}\0'.encode() + file.read_bytes() + b'\0')
  return digest.hexdigest()[:16]


def _receive_all(mesh, address) -> dict[int, _Connection]:
  """Process 0: waits for all others."""
  deadline = time.monotonic() + mesh.start_timeout_s
  found: dict[int, _Connection] = {}
  try:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    listener = socket.create_server(('', address[1]), family=family, dualstack_ipv6=family == socket.AF_INET6)
  except OSError as error:
    raise UserError(
      f'process 0 cannot listen at config mesh.coordinator = {mesh.coordinator!r}: {error.strerror}'
    ) from error
  with listener:
    while len(found) < mesh.num_processes - 1:
      listener.settimeout(max(deadline - time.monotonic(), 1e-3))
      try:
        sock, _ = listener.accept()
      except TimeoutError:
        missing = [i for i in range(1, mesh.num_processes) if i not in found]
        absent = f'{_numbers(missing)} of {mesh.num_processes} did not come to {mesh.coordinator} within '
        _refuse(found.values(), absent + f'mesh.start_timeout_s = {mesh.start_timeout_s} s')
      sock.settimeout(max(min(deadline - time.monotonic(), WORD_S), 1e-3))
      reader = sock.makefile('rb')
      try:
        hello = _message(reader)
        number, name = int(hello['process']), f'process {hello["process"]} ({hello["host"]}, pid {hello["pid"]})'
      except (OSError, ValueError, KeyError, TypeError, RecursionError):
        reader.close()  # a scan of ports, or another program
        sock.close()
        continue
      peer = _Connection(sock, number, name, reader)
      if number in found:
        _refuse(
          [peer, *found.values()], f'two processes have mesh.process_id = {number}: {found[number].name} and {name}'
        )
      if not 0 < number < mesh.num_processes:
        _refuse(
          [peer, *found.values()], f'{name} does not belong to a run of mesh.num_processes = {mesh.num_processes}'
        )
      found[number] = peer
  for peer in found.values():
    with contextlib.suppress(OSError):  # one that is gone since is noticed where it is listened to
      peer.send({'welcome': True})
  return found


def _refuse(peers, error) -> NoReturn:
  for peer in peers:
    with contextlib.suppress(OSError):
      peer.send({'error': error})
    peer.close()
  raise UserError(error)


def _visit(mesh, address) -> dict[int, _Connection]:
  """Another process: goes to process 0 and waits to be let in."""
  deadline, why = time.monotonic() + mesh.start_timeout_s, 'nobody listens'
  while (left := deadline - time.monotonic()) > 0:
    try:
      sock = socket.create_connection(address, timeout=left)
    except socket.gaierror as error:
      raise UserError(f'config mesh.coordinator = {mesh.coordinator!r}: no such host ({error.strerror})') from error
    except OSError as error:
      why = error.strerror or str(error)
      time.sleep(TRIES_S)
      continue
    peer = _Connection(sock, 0, f'process 0 ({mesh.coordinator})')
    sock.settimeout(max(deadline - time.monotonic(), 1e-3) + WORD_S)  # process 0 gives up first, and says why
    try:
      peer.send({'process': mesh.process_id, 'pid': os.getpid(), 'host': platform.node()})
      answer = peer.receive()
    except (OSError, ValueError):  # not process 0, or one that ended just now
      why = 'what listens there does not answer as process 0'
      peer.close()
      time.sleep(TRIES_S)
      continue
    if 'error' in answer:
      peer.close()
      raise UserError(answer['error'])
    sock.settimeout(None)
    return {0: peer}
  raise UserError(
    f'process {mesh.process_id} did not reach process 0 at mesh.coordinator = {mesh.coordinator!r} within '
    f'mesh.start_timeout_s = {mesh.start_timeout_s} s ({why})'
  )


def _address(text: str) -> tuple[str, int]:
  host, _, port = text.rpartition(':')
  if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
    raise UserError(f'config mesh.coordinator = {text!r} must be the host:port of process 0, with a port of 1 to 65535')
  return host.strip('[]'), int(port)


def _difference(ours: dict, theirs: dict[int, dict]) -> str:
  """One line about the first fact in which a process differs from process 0; '' if none does."""
  for process_id, facts in sorted(theirs.items()):
    for key in sorted(ours.keys() | facts.keys()):
      if ours.get(key) != facts.get(key):
        return (
          f'process {process_id} has {key} = {repr(facts.get(key))[:80]} and process 0 {repr(ours.get(key))[:80]}; '
          'all processes of a run need the same settings, text and code'
        )
  return ''


def _message(reader) -> dict:
  line = reader.readline(MOST_BYTES)
  if not line.endswith(b'\n'):
    raise ValueError('the connection ended')
  found = json.loads(line)
  if not isinstance(found, dict):
    raise ValueError('no message')
  return found


def _numbers(found: list[int]) -> str:
  shown = ', '.join(map(str, found[:8])) + (', ...' if len(found) > 8 else '')
  return f'process{"es" if len(found) > 1 else ""} {shown}'


def _end(why: str) -> NoReturn:
  """Ends this process, whose main thread may hang in a collective for ever."""
  print(f'\nerror: {why}', file=sys.stderr, flush=True)
  os._exit(2)
