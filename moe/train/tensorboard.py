"""Scalars for TensorBoard, written where they are logged: a thread of its own, as tensorboardX's SummaryWriter has,
dies of a full disk with a traceback, and the next rows then wait for it for ever.
"""

import os
import pathlib
import platform
import time

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

FLUSH_S = 30.0


class Board:
  """One file of events. Every method may raise OSError."""

  def __init__(self, folder: pathlib.Path, first_step: int):
    """Opens a new file; TensorBoard then hides what others in the folder say of `first_step` and later ones."""
    folder.mkdir(exist_ok=True)
    name = f'events.out.tfevents.{int(time.time()):010}.{platform.node()}.{os.getpid()}.{time.time_ns()}'
    self._records, self._flushed_s = RecordWriter(str(folder / name)), time.monotonic()
    self._write(file_version='brain.Event:2')
    self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

  def add(self, step: int, scalars: dict[str, float]) -> None:
    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    self._write(step=step, summary=Summary(value=values))
    if time.monotonic() >= self._flushed_s + FLUSH_S:
      self._records.flush()
      self._flushed_s = time.monotonic()

  def close(self) -> None:
    self._records.close()

  def _write(self, **fields):
    self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())
