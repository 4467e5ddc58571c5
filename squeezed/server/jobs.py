"""Documents on their way to being contexts: one at a time, on the disk, resumed after a restart."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any
from uuid import uuid4

from squeezed.errors import SqueezedError
from squeezed.server.documents.extract import Limits, text_of_upload
from squeezed.server.library.library import Library
from squeezed.server.library.notes import PLACE, Note, write_json
from squeezed.server.port import Engine, Progress
from squeezed.server.refusals import Refusal, refusal_of
from squeezed.vllm.catalogue import version_of

log = logging.getLogger("squeezed")

INDEX, APPEND = "index", "append"
WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
ENDED = (DONE, FAILED, CANCELLED)
MOST_BEGINNINGS = 3
"""A job that was running at so many ends of the server is not begun again."""

KEPT = 200
"""Ended jobs that can still be asked for."""

DOCUMENT = "document"


class Stopped(Exception):
    """The work was told to end."""


@dataclass
class Job:
    """One document on its way.

    Attributes:
        context: name that the context has, or will have.
        kind: `index` makes a context, `append` puts more text behind that of one.
        base: version of the context to which text is appended, as it was when that was begun.
        file: name of the uploaded file; `None` for a text.
        state: `waiting`, `running`, `done`, `failed` or `cancelled`.
        phase: `parse`, `prefill`, `cluster`, `calibrate` or `save`, with steps `done` of `total`.
        begun: how often it was begun.
    """

    id: str
    context: str
    file: str | None = None
    note: dict[str, Any] | None = None
    state: str = WAITING
    phase: str | None = None
    done: int = 0
    total: int = 0
    error: str | None = None
    created: float = 0.0
    finished: float | None = None
    begun: int = 0
    kind: str = INDEX
    base: str | None = None

    @property
    def public(self) -> dict[str, Any]:
        """The job as `/v1/jobs` shows it."""
        shown = {k: v for k, v in asdict(self).items() if k not in ("note", "begun", "base")}
        created, finished = int(self.created), self.finished and int(self.finished)
        return {"object": "context.job", **shown, "created": created, "finished": finished}


class Jobs:
    """The jobs of one server; `work` must run as a task."""

    def __init__(self, library: Library, engine: Engine, limits: Limits, most: int) -> None:
        self.library, self.engine, self.limits, self.most = library, engine, limits, most
        self.place = library.directory / PLACE / "jobs"
        self.place.mkdir(parents=True, exist_ok=True)
        self.jobs: dict[str, Job] = {}
        self.storing: set[str] = set()
        """Jobs whose document is on its way to the disk: not begun yet."""
        self.changed = asyncio.Condition()
        self.closing = False
        self._load()

    def named(self, id: str) -> Job:
        if id not in self.jobs:
            raise Refusal(404, f"job: there is none called {id!r}", "job", "job_not_found")
        return self.jobs[id]

    def latest(self) -> list[Job]:
        return sorted(self.jobs.values(), key=lambda job: -job.created)

    def check_room(self, name: str) -> str:
        """A name for a new context; raises `Refusal` if it is taken, or too many jobs wait."""
        name = self.library.check_free(name)
        waiting = [job for job in self.jobs.values() if job.state not in ENDED]
        if any(job.context == name for job in waiting):
            raise Refusal(409, f"name: {name!r} is being made already", "name", "name_taken")
        return self._check_waiting(name)

    def _check_waiting(self, name: str) -> str:
        """The name; raises `Refusal` if too many jobs wait."""
        waiting = [job for job in self.jobs.values() if job.state not in ENDED]
        if len(waiting) >= self.most:
            raise Refusal(
                429, f"{len(waiting)} documents wait already; try later", None, "busy", 30
            )
        return name

    async def add(
        self, name: str, data: bytes, file: str | None, note: Note, kind: str = INDEX
    ) -> Job:
        """Take a document, on the disk before this returns.

        Args:
            kind: `append` takes it for a context that is there.
        """
        name = self.check_room(name) if kind == INDEX else self._check_waiting(name)
        job = Job(f"job-{uuid4().hex}", name, file, asdict(note), created=time.time(), kind=kind)
        self.jobs[job.id] = job  # from now on the name is taken
        self.storing.add(job.id)
        try:
            await asyncio.to_thread(self._store, job, data)
        except BaseException:
            del self.jobs[job.id]
            shutil.rmtree(self.place / job.id, ignore_errors=True)
            raise
        finally:
            self.storing.discard(job.id)
        self._forget_old()
        await self._tell()
        return job

    async def cancel(self, id: str) -> Job:
        """End a job; one that is running ends at its next step."""
        job = self.named(id)
        if job.state not in ENDED:
            await self._end(job, CANCELLED)
        return job

    async def watch(self, id: str) -> AsyncIterator[Job]:
        """The job at every change, until it has ended."""
        job, seen = self.named(id), None
        while True:
            state = (job.state, job.phase, job.done)
            if state != seen:
                seen = state
                yield job
            if job.state in ENDED or self.closing:
                return
            await self._change()

    async def work(self) -> None:
        """Carry jobs out, one after the other, until cancelled."""
        while True:
            waiting = [
                job
                for job in self.jobs.values()
                if job.state == WAITING and job.id not in self.storing
            ]
            if not waiting:
                await self._change()
                continue
            await self._run(min(waiting, key=lambda job: job.created))

    async def _run(self, job: Job) -> None:
        job.state, job.begun = RUNNING, job.begun + 1
        try:
            await asyncio.to_thread(self._write, job)
            await self._make(job)
        except Stopped:
            return  # cancelled, or begun again by the next server
        except asyncio.CancelledError:
            self.closing = True
            raise
        except Exception as error:
            if not isinstance(error, (SqueezedError, OSError)):
                log.exception("contexts: %s could not be made", job.context)
            await self._end(job, FAILED, refusal_of(error).message)
        else:
            job.done = job.total
            await self._end(job, DONE)

    async def _make(self, job: Job) -> None:
        loop = asyncio.get_running_loop()

        def progress(phase: str, done: int, total: int) -> None:
            if self.closing or job.state != RUNNING:
                raise Stopped
            job.phase, job.done, job.total = phase, done, total
            loop.call_soon_threadsafe(lambda: loop.create_task(self._tell()))

        progress("parse", 0, 1)
        text = await asyncio.to_thread(self._text, job, lambda: progress("parse", 0, 1))
        if job.kind == APPEND:
            await self._append(job, text, progress)
            return
        path = self.library.path_of(job.context)
        if not path.exists():
            await self.engine.index(text, path, progress)
        elif job.begun == 1:  # else it was saved, and then the server was killed
            raise SqueezedError(f"name: {job.context!r} was taken meanwhile; choose another name")
        note = Note.of(job.note or {})
        await asyncio.to_thread(self.library.made, job.context, note)

    async def _append(self, job: Job, text: str, progress: Progress) -> None:
        """A job that was saved before the server was killed finds another version: it is done."""
        entry = await asyncio.to_thread(self.library.named, job.context)
        if job.base is None:
            job.base = entry.version
            await asyncio.to_thread(self._write, job)
        if job.base == await asyncio.to_thread(version_of, entry.path):
            await self.engine.append(text, entry.path, progress)
        await asyncio.to_thread(self.library.grown, job.context)

    def _text(self, job: Job, look: Any) -> str:
        path = self.place / job.id / DOCUMENT
        if job.file is None:
            return path.read_text(encoding="utf-8")
        return text_of_upload(job.file, path, self.limits, look)

    async def _end(self, job: Job, state: str, error: str | None = None) -> None:
        job.state, job.error, job.finished = state, error, time.time()
        with suppress(OSError):  # a disk that is full now
            await asyncio.to_thread(self._write, job)
            (self.place / job.id / DOCUMENT).unlink(missing_ok=True)
        await self._tell()

    async def _change(self) -> None:
        """Wait until something changed, for a second at most."""
        async with self.changed:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), 1.0)

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    def _store(self, job: Job, data: bytes) -> None:
        directory = self.place / job.id
        directory.mkdir()
        (directory / DOCUMENT).write_bytes(data)
        self._write(job)

    def _write(self, job: Job) -> None:
        write_json(self.place / job.id / "job.json", asdict(job))

    def _load(self) -> None:
        """Take up what an earlier server left."""
        known = {each.name for each in fields(Job)}
        for directory in self.place.iterdir():
            try:
                stored = json.loads((directory / "job.json").read_text(encoding="utf-8"))
                job = Job(**{name: value for name, value in stored.items() if name in known})
            except (OSError, ValueError, TypeError, AttributeError):
                shutil.rmtree(directory, ignore_errors=True)  # it was never answered for
                continue
            if job.state not in ENDED:
                job.state, job.phase, job.done, job.total = WAITING, None, 0, 0
                if job.begun >= MOST_BEGINNINGS:
                    job.state, job.finished = FAILED, time.time()
                    job.error = f"the server ended {job.begun} times while it made this context"
            self.jobs[job.id] = job
        self._forget_old()

    def _forget_old(self) -> None:
        for job in self.latest()[KEPT:]:
            if job.state in ENDED:
                del self.jobs[job.id]
                shutil.rmtree(self.place / job.id, ignore_errors=True)
