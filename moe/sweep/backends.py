"""Where the runs of a sweep go: processes of this machine, or the nodes of a Ray cluster.

A backend has `submit(job)`, a future; `result(future, job)` once that is done; `stop()`, after which all running jobs
save and end; and `close()`.
"""

import concurrent.futures
import functools
import os
import queue
import signal
import socket
import threading
from typing import Any

from moe.errors import UserError, one_line
from moe.files.paths import PACKAGE
from moe.sweep.jobs import POLL_S, Job, Result, run_job

CONNECT_S, JOIN_S = 5.0, 60.0  # for a port to answer, and for Ray to be what answers


class Local:
  """Processes of this machine; with `gpus_per_run`, each sees that many GPUs, which no other run sees meanwhile."""

  def __init__(self, limit: int, gpus_per_run: int = 0):
    """At most `limit` processes. Raises UserError if CUDA_VISIBLE_DEVICES names too few GPUs for them."""
    self._pool = concurrent.futures.ThreadPoolExecutor(limit)
    self._stop = threading.Event()
    self._slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for slot in _slots(limit, gpus_per_run):
      self._slots.put(slot)

  def submit(self, job: Job) -> concurrent.futures.Future:
    return self._pool.submit(self._run, job)

  def result(self, future: concurrent.futures.Future, job: Job) -> Result:
    return future.result()

  def stop(self) -> None:
    self._stop.set()

  def close(self) -> None:
    self._stop.set()  # nothing runs any more, unless an exception ended the sweep
    self._pool.shutdown()

  def _run(self, job):
    slot = self._slots.get()
    try:
      return run_job(job, os.environ | slot, self._stop)
    finally:
      self._slots.put(slot)


def _slots(limit, gpus_per_run):
  """One set of environment variables per process that may run at the same time."""
  if not gpus_per_run:
    return [{}] * limit
  wanted = limit * gpus_per_run
  visible = os.environ.get('CUDA_VISIBLE_DEVICES')
  gpus = visible.split(',') if visible else [str(number) for number in range(wanted)]
  if len(gpus) < wanted:
    raise UserError(f'{limit} jobs of {gpus_per_run} GPUs need {wanted}, CUDA_VISIBLE_DEVICES = {visible} has fewer')
  return [
    {'CUDA_VISIBLE_DEVICES': ','.join(gpus[first : first + gpus_per_run])} for first in range(0, wanted, gpus_per_run)
  ]


class Ray:
  """Tasks of a Ray cluster whose nodes share the results folder and this checkout, both under the same paths."""

  def __init__(self, address: str = '', cpus_per_run: int = 1, gpus_per_run: int = 0):
    """Joins the cluster at `address`, or a running one, or starts one on this machine.

    Raises:
      UserError: Ray is not installed, or nothing answers at the address.
    """
    try:
      import ray
    except ModuleNotFoundError as error:
      raise UserError("--backend=ray needs Ray, which is not installed: pip install -e '.[ray]'") from error
    _check_reachable(address)
    join = functools.partial(
      ray.init,
      address=address or None,
      log_to_driver=False,
      logging_level='error',
      runtime_env={'env_vars': {'PYTHONPATH': str(PACKAGE.parent), 'RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO': '0'}},
    )
    try:
      _within(JOIN_S, join) if _names_a_cluster(address) else join()
    except TimeoutError as error:
      raise UserError(
        f'what answers at {address!r} is no Ray cluster: it let no one join for {JOIN_S:.0f} s'
      ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
      hint = 'a cluster with tokens wants RAY_AUTH_MODE=token here'
      raise UserError(f'no Ray cluster at {address or "auto"!r}: {error}; {hint}') from error
    self._ray = ray
    self._task = ray.remote(num_cpus=cpus_per_run, num_gpus=gpus_per_run, max_retries=0)(_ray_task)
    self._references: dict[concurrent.futures.Future, Any] = {}  # the values are of Ray

  def submit(self, job: Job) -> concurrent.futures.Future:
    reference = self._task.remote(job)
    future = reference.future()
    self._references[future] = reference
    return future

  def result(self, future: concurrent.futures.Future, job: Job) -> Result:
    del self._references[future]
    try:
      return future.result()
    except self._ray.exceptions.TaskCancelledError:
      return Result(job.name, 'stopped', 'the same command continues')
    except self._ray.exceptions.RayError as error:
      return Result(job.name, 'failed', one_line(error))

  def stop(self) -> None:
    for reference in self._references.values():
      self._ray.cancel(reference)

  def close(self) -> None:
    self._ray.shutdown()


def _ray_task(job: Job) -> Result:
  """A job on a node; cancelling it raises KeyboardInterrupt here, and the run saves."""
  # Ray cancels by SIGINT, which a cluster started by a background job of a shell would ignore.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  stop = threading.Event()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    future = pool.submit(run_job, job, dict(os.environ), stop)
    while True:
      try:
        return future.result(POLL_S)  # awake often: Ray's interrupt does not wake a sleeping thread
      except concurrent.futures.TimeoutError:
        continue
      except KeyboardInterrupt:
        stop.set()


def _within(seconds: float, call):
  """What `call` returns or raises; TimeoutError after `seconds`, with the call left behind in a daemon thread."""
  future: concurrent.futures.Future = concurrent.futures.Future()

  def run():
    try:
      future.set_result(call())
    except BaseException as error:
      future.set_exception(error)

  threading.Thread(target=run, daemon=True).start()
  return future.result(seconds)


def _names_a_cluster(address: str) -> bool:
  return address not in ('', 'auto', 'local')


def _check_reachable(address: str):
  """Raises UserError at once where Ray itself would try for a minute."""
  if not _names_a_cluster(address):
    return
  host, colon, port = address.removeprefix('ray://').rpartition(':')
  if not colon or not port.isdecimal():
    raise UserError(f"--ray_address = {address!r} must look like host:6379, ray://host:10001, 'auto' or 'local'")
  try:
    socket.create_connection((host, int(port)), CONNECT_S).close()
  except (OSError, OverflowError, ValueError) as error:  # ValueError: no host has such a name
    raise UserError(f'no Ray cluster answers at --ray_address = {address!r} ({error})') from error
