"""The processes of a run: here threads that meet over real sockets, and one process that is killed."""

import concurrent.futures
import os
import pathlib
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

from moe.config import Config, MeshConfig, from_config_dict, to_config_dict
from moe.errors import UserError
from moe.parallel import processes
from moe.train import run_dir

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def port(monkeypatch):
  monkeypatch.setattr(processes, 'WORD_S', 0.1)
  with socket.create_server(('', 0)) as server:
    return server.getsockname()[1]


def mesh(port, process_id, count=3, timeout_s=20):
  return MeshConfig(
    coordinator=f'localhost:{port}', num_processes=count, process_id=process_id, start_timeout_s=timeout_s
  )


def together(*works):
  """What each of the works, called at the same time, returns or says as it refuses."""

  def said(work):
    try:
      return work()
    except UserError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(len(works)) as pool:
    return list(pool.map(said, works))


def member(port, process_id, facts, then=lambda peers: 'done', **settings):
  def work():
    with processes.joined(mesh(port, process_id, **settings), facts, lambda text: None) as peers:
      return then(peers)

  return work


def test_processes_of_one_mind_go_on_and_leave_the_port(port):
  agreed = lambda peers: peers.agree({'the text': 'a'})
  assert together(*(member(port, i, {'train.seed': 3}, agreed) for i in range(3))) == [None] * 3

  def listens(peers):
    with socket.create_server(('', port)):  # as JAX does
      return 'free'

  assert together(member(port, 0, {}, listens), *(member(port, i, {}) for i in (1, 2))) == ['free', 'done', 'done']


@pytest.mark.parametrize(
  ('key', 'value'), [('train.seed', 1), ('optimizer.learning_rate', 0.5), ('train.steps', 7), ('data.seq_len', 64)]
)
def test_another_setting_is_named_by_all(port, key, value):
  other = to_config_dict(Config())
  other[key.split('.')[0]][key.split('.')[1]] = value
  facts = [run_dir.shared_settings(config) for config in (Config(), Config(), from_config_dict(other))]
  found = together(*(member(port, i, facts[i]) for i in range(3)))
  assert len(set(found)) == 1
  assert f'process 2 has {key} = {value!r} and process 0' in found[0]


def test_settings_of_a_host_may_differ():
  mine = Config(mesh=MeshConfig(process_id=1, coordinator='a:1', num_processes=2))
  theirs = Config(mesh=MeshConfig(process_id=0, coordinator='b:1', num_processes=2))
  assert run_dir.shared_settings(mine) == run_dir.shared_settings(theirs) != run_dir.shared_settings(Config())


def test_other_text_is_named_by_all(port):
  works = [member(port, i, {}, lambda peers, i=i: peers.agree({'the text': 'ab'[i]}), count=2) for i in range(2)]
  found = together(*works)
  assert found[0] == found[1]
  assert "process 1 has the text = 'b' and process 0 'a'" in found[0]


def test_other_code_is_named(port, monkeypatch):
  digests = iter('ab')
  monkeypatch.setattr(processes, 'code_digest', lambda: next(digests))
  found = together(*(member(port, i, {}, count=2) for i in range(2)))
  assert 'process 1 has the code = ' in found[0] == found[1]


@pytest.mark.parametrize('address', ['localhost', 'localhost:', ':80', 'localhost:99999', 'localhost:0', 'localhost:x'])
def test_an_address_that_is_none(address):
  joined = processes.joined(MeshConfig(coordinator=address, num_processes=2), {}, print)
  with pytest.raises(UserError, match=r'must be the host:port of process 0, with a port of 1 to 65535'), joined:
    pass


def test_an_unknown_host():
  joined = processes.joined(MeshConfig(coordinator='no.invalid:80', num_processes=2, process_id=1), {}, print)
  with pytest.raises(UserError, match='no such host'), joined:
    pass


def test_a_port_that_is_taken(port):
  with socket.create_server(('', port)):
    (found,) = together(member(port, 0, {}))
  assert 'process 0 cannot listen at config mesh.coordinator' in found
  assert 'in use' in found


def test_who_does_not_come_is_named(port):
  found = together(*(member(port, i, {}, count=4, timeout_s=1) for i in (0, 2)))
  assert found[0] == found[1]
  assert 'processes 1, 3 of 4 did not come' in found[0]
  (alone,) = together(member(port, 1, {}, timeout_s=1))
  assert f"process 1 did not reach process 0 at mesh.coordinator = 'localhost:{port}' within" in alone


def test_two_with_one_number(port):
  found = together(*(member(port, i, {}, timeout_s=5) for i in (0, 1, 1)))
  assert len(set(found)) == 1
  assert 'two processes have mesh.process_id = 1: process 1 (' in found[0]


def test_another_program_at_the_port_is_passed_over(port):
  def scan():
    for _ in range(100):
      try:
        with socket.create_connection(('localhost', port)) as sock:
          return sock.sendall(b'GET / HTTP/1.0\r\n\r\n')
      except OSError:
        time.sleep(0.05)

  late = member(port, 1, {}, count=2)
  assert together(member(port, 0, {}, count=2), lambda: (scan(), late())[1])[0] == 'done'


def test_a_process_that_dies_while_others_are_waited_for_is_left_to_who_listens(port):
  def visits(process_id):
    for _ in range(100):
      try:
        sock = socket.create_connection(('localhost', port))
      except OSError:
        time.sleep(0.05)
        continue
      hello = f'{{"process": {process_id}, "host": "here", "pid": 1}}'
      sock.sendall((hello if process_id else '[' * 100_000).encode() + b'\n')
      return sock

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    one = pool.submit(processes._receive_all, mesh(port, 0), ('localhost', port))
    with visits(0), visits(1) as killed:  # the former is another program, whose JSON is too deep
      time.sleep(0.5)  # until it has been heard
      killed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))  # ends it as a lost host does
    with visits(2):
      peers = one.result()
  assert sorted(peers) == [1, 2]
  with pytest.raises((OSError, ValueError)):
    peers[1].receive()
  for peer in peers.values():
    peer.close()


def ending(monkeypatch):
  """Gets the words with which a process would end for what happened to another."""
  words = queue.Queue()
  monkeypatch.setattr(processes, '_end', words.put)
  return words


def test_an_error_of_one_ends_all_in_its_words(port, monkeypatch):
  words, waiting = ending(monkeypatch), threading.Event()

  def fails(peers):
    raise UserError('no such text')

  works = [member(port, 0, {}, lambda peers: waiting.wait(20)), member(port, 1, {}, lambda peers: waiting.wait(20))]
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    others = pool.submit(together, *works, member(port, 2, {}, fails))
    assert [words.get(timeout=20) for _ in range(2)] == ['process 2: no such text'] * 2
    waiting.set()
    assert others.result()[2] == 'no such text'


def test_a_killed_process_is_named(port, monkeypatch):
  words, waiting = ending(monkeypatch), threading.Event()
  program = f"""
import time
from moe.parallel import processes
from moe.config import MeshConfig
with processes.joined(MeshConfig(coordinator='localhost:{port}', num_processes=2, process_id=1), {{}}, print):
  print('in', flush=True)
  time.sleep(60)
"""
  command = [sys.executable, '-c', program]
  started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  with started as other, concurrent.futures.ThreadPoolExecutor(1) as pool:
    one = pool.submit(member(port, 0, {}, lambda peers: waiting.wait(60), count=2, timeout_s=60))
    assert other.stdout.readline() == 'in\n'
    os.kill(other.pid, signal.SIGKILL)
    assert f'pid {other.pid}) of the run is gone' in words.get(timeout=20)
    waiting.set()
    one.result()
