"""Kill -9 at random moments of a save, and savers and readers at once: what lies there afterwards.

    python benchmarks/kill_saves.py --place /dev/shm --output benchmarks/kill_saves.json

Small contexts of random numbers, made without a model; a child saves, and is killed after a random
part of the time that a save takes. Then the context must be the older one or the new one, whole,
every tensor equal; the next save must leave nothing but the context. "Without names" is how Linux
writes new files until all are complete, "with names" what other systems do. Among others, savers
are killed while two more save and five processes read. With `--namespaces` (Linux, as root,
`unshare`) every killed saver has process number 1, as in containers that share a volume.

A part may be run at a time: counts are added to those in `--output`, if it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from made import made_context, same_context

from squeezed.context.storage.directory import load
from squeezed.context.storage.manifest import listed_files
from squeezed.context.storage.saving import save
from squeezed.errors import ContextFileError
from squeezed.measure.record import about_run
from squeezed.system import files

SIGNAL_MARGIN = 1.15
"""Kills fall into this many times the duration of a save, so that some come too late."""
TIMED_AGAIN = 50
"""Kills after which that duration is measured anew: a shared machine is slow now and then."""

UNNAMED = files.unnamed
WAYS = {"without names": UNNAMED, "with names": lambda directory: None}


def content(path: Path, known: dict[str, object]) -> str:
    """Which of the known contexts lies at `path`, read whole; `none`, or what is wrong."""
    if not path.exists() and not any(path.parent.iterdir()):
        return "none"
    try:
        found = load(path)
        return next((n for n, context in known.items() if same_context(found, context)), "mixed")
    except ContextFileError as error:
        return "none" if "no saved context" in str(error) else "broken"


class Campaign:
    """Saves of `new` over `old`, or over nothing, killed; and what was found after each."""

    def __init__(self, place: Path, over_old: bool, way: str) -> None:
        self.target, self.over_old = place / "c.sqz", over_old
        self.known = {"old": made_context(0), "new": made_context(1)}
        files.unnamed = WAYS[way]
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []

    def run(self, kills: int, until: float, rng: random.Random) -> dict:
        """Kill so many saves before their end, but for what the time does not allow."""
        while self.counts["saves killed"] < kills and time.monotonic() < until:
            if not self.counts.total() or not sum(self._tries()) % TIMED_AGAIN:
                self.seconds.append(sorted(self._timed() for _ in range(5))[2])
            self.kill(rng)
        return {"save_ms": [round(1e3 * s, 1) for s in self.seconds], **self.counts}

    def _tries(self) -> tuple[int, int]:
        return self.counts["saves killed"], self.counts["saves that had ended"]

    def _timed(self) -> float:
        self._lay_out()
        started = time.perf_counter()
        os.waitpid(self._saver(), 0)
        return time.perf_counter() - started

    def _saver(self) -> int:
        child = os.fork()
        if child == 0:
            save(self.known["new"], self.target)
            os._exit(0)
        return child

    def _lay_out(self) -> None:
        shutil.rmtree(self.target.parent, ignore_errors=True)
        self.target.parent.mkdir()
        if self.over_old:
            save(self.known["old"], self.target)

    def kill(self, rng: random.Random) -> None:
        self._lay_out()
        child = self._saver()
        time.sleep(rng.random() * SIGNAL_MARGIN * self.seconds[-1])
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        self.counts["saves killed" if code else "saves that had ended"] += 1
        self.counts[f"found {content(self.target, self.known)}"] += 1
        self.counts["left rubbish until the next save"] += self._rubbish()
        save(self.known["new"], self.target)
        self.counts["left rubbish after the next save"] += self._rubbish()

    def _rubbish(self) -> bool:
        """Anything but the context: beside it, or in it and not listed."""
        if any(entry != self.target for entry in self.target.parent.iterdir()):
            return True
        if not self.target.exists():
            return False
        return listed_files(self.target) != set(os.listdir(self.target))


def killed(place: Path, kills: int, seconds: float, seed: int) -> dict[str, dict]:
    found = {}
    for way in WAYS:
        for over_old in (True, False):
            name = f"{way}, over {'an older context' if over_old else 'nothing'}"
            campaign = Campaign(place, over_old, way)
            until = time.monotonic() + seconds / 4
            found[name] = campaign.run(kills, until, random.Random(f"{seed} {name}"))
            print(name, found[name], file=sys.stderr)
    return found


def crowd(place: Path, kills: int, seconds: float, way: str, seed: int) -> dict[str, int]:
    """Three savers and five readers on one name: all of them live on, or savers are killed."""
    files.unnamed = WAYS[way]
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    contexts = {str(seed): made_context(seed) for seed in range(3)}
    target, said = save(contexts["0"], place / "c.sqz"), Path(f"{place}.said")
    end, rng, counts = time.monotonic() + seconds, random.Random(seed), Counter()
    with said.open("ab", buffering=0) as said_by_all:
        children = [_crowd_member(i, target, contexts, end, said_by_all) for i in range(8)]
        while counts["savers killed"] < kills and time.monotonic() < end:
            index = rng.randrange(len(contexts))
            time.sleep(rng.random() / 5)
            os.kill(children[index], signal.SIGKILL)
            counts["savers killed"] += os.waitpid(children[index], 0)[1] == signal.SIGKILL
            children[index] = _crowd_member(index, target, contexts, end, said_by_all)
    for child in children:
        counts["processes that failed"] += os.waitpid(child, 0)[1] != 0
    counts.update(said.read_text().splitlines())
    said.unlink()
    save(contexts["0"], target)
    counts["left rubbish after the next save"] = len(list(place.iterdir())) - 1
    return dict(counts)


def _crowd_member(index: int, target: Path, contexts: dict, end: float, said: BinaryIO) -> int:
    child = os.fork()
    if child == 0:
        while time.monotonic() < end:
            said.write(f"{_turn(index, target, contexts)}\n".encode())
        os._exit(0)
    return child


def _turn(index: int, target: Path, contexts: dict) -> str:
    if index < len(contexts):
        try:
            save(contexts[str(index)], target)
            return "saved"
        except ContextFileError:
            return "a save refused"
    found = content(target, contexts)
    return "read whole" if found in contexts else f"read {found}"


def in_namespaces(place: Path, kills: int, seed: int) -> dict[str, int] | None:
    """Pairs of savers at once, each process 1 of its own namespace, killed one after the other."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, __file__, "--child"]
    target, counts, rng = place / "c.sqz", Counter(), random.Random(seed)
    contexts = {str(s): made_context(s) for s in range(3)}
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    save(contexts["0"], target)
    if subprocess.run([*unshare, str(target), "0", "1"], capture_output=True).returncode:
        return None
    for _ in range(kills):
        words = [[*unshare, str(target), str(saver), "1000000"] for saver in (1, 2)]
        pair = [subprocess.Popen(line, stdout=subprocess.PIPE) for line in words]
        for saver in pair:
            saver.stdout.readline()  # it saves
        for saver in pair:
            time.sleep(rng.random() / 5)
            saver.kill()
            saver.communicate()  # ends when the process inside has ended, too
        counts["pairs"] += 1
        counts[f"found {'whole' if content(target, contexts) in contexts else 'broken'}"] += 1
        save(contexts["0"], target)
        counts["left rubbish after the next save"] += len(list(place.iterdir())) > 1
    return dict(counts)


def added(one: object, other: object) -> object:
    """Counts of two parts together; lists are joined."""
    if isinstance(one, dict):
        names = [*one, *(name for name in other if name not in one)]
        return {
            n: added(one[n], other[n]) if n in one and n in other else one.get(n, other.get(n))
            for n in names
        }
    return one + other


def part(given: argparse.Namespace, place: Path) -> dict:
    """What one run of this program finds."""
    about = about_run("cpu") | {"processors": os.cpu_count(), "load": os.getloadavg()[0]}
    record = {"parts": [about]}
    if given.kills:
        record["kills"] = killed(place, given.kills, 60 * given.minutes, given.seed)
    if given.seconds:
        for name, kills in (("all live on", 0), ("savers are killed", given.crowd_kills)):
            record[f"three savers, five readers; {name}"] = {
                way: crowd(place, kills, given.seconds, way, given.seed) for way in WAYS
            }
    if given.namespaces:
        files.unnamed = UNNAMED
        found = in_namespaces(place, given.namespaces, given.seed)
        record["process namespaces"] = found or {"refused by the system": 1}
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500, help="of each of four kinds")
    parser.add_argument("--minutes", type=float, default=30, help="that kills take at most")
    parser.add_argument("--seconds", type=float, default=30, help="of savers and readers at once")
    parser.add_argument("--crowd-kills", type=int, default=100, help="at most, in those seconds")
    parser.add_argument("--namespaces", type=int, default=0, help="pairs of savers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", type=Path, help="a directory; memory suffices for kills")
    parser.add_argument("--output", type=Path, help="counts that lie there are added to")
    parser.add_argument("--child", nargs=3, metavar=("TARGET", "SEED", "SAVES"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.child:
        context = made_context(int(given.child[1]))
        print("ready", flush=True)
        for _ in range(int(given.child[2])):
            save(context, Path(given.child[0]))
        return
    with tempfile.TemporaryDirectory(dir=given.place) as root:
        record = part(given, Path(root) / "saves")
    if given.output and given.output.exists():
        record = added(json.loads(given.output.read_text()), record)
    text = json.dumps(record, indent=1)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
