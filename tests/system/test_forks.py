"""Children of a process that has worked answer as it did, with as many threads."""

import os
import pickle
import subprocess
import sys

import pytest

from squeezed.system.forks import Turns

PROGRAM = """
import os, sys, threading, time
import torch
import squeezed
from squeezed.attention import Suffix, implementation
from squeezed.context.rule import SelectionRule
from trees import random_layer

torch.set_num_threads(2)
attend = implementation(sys.argv[1], torch.device("cpu"))
generator = torch.Generator().manual_seed(0)
layer = random_layer()
query, suffix, large = (
    torch.randn(shape, generator=generator) for shape in ((1, 4, 1, 32), (1, 2, 3, 32), (700, 700))
)
rule = SelectionRule.for_all_heads((-9.0, -9.0), layer, None, "none")

def work():
    found = attend(query, layer, rule, Suffix(suffix, suffix)).output
    return found, (large @ large).softmax(-1).sum(-1)  # split among torch's threads

expected = work()

def same():
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(work(), expected))

def child(generations):
    process = os.fork()
    if process == 0:
        right = same() and torch.get_num_threads() == 2
        os._exit(0 if right and (generations == 1 or child(generations - 1)) else 1)
    for _ in range(1200):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.05)
    os.kill(process, 9)
    return False

def beside(other):
    "A child made by a thread that never worked, or while another works."
    found, stop = [], threading.Event()
    def busy():
        while not stop.is_set():
            work()
    maker = threading.Thread(target=lambda: found.append(child(1)))
    worker = threading.Thread(target=busy if other else int)
    worker.start()
    maker.start()
    maker.join()
    stop.set()
    worker.join()
    return found[0]

print([child(2), child(1), beside(False), beside(True), same()])
"""


@pytest.mark.parametrize("layer", ["default", "workqueue"])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_children_answer_like_their_parent(implementation, layer):
    if implementation == "reference" and layer != "default":
        pytest.skip("the reference has no Numba")
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "NUMBA_THREADING_LAYER": layer}
    environment |= {"NUMBA_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, implementation],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.stdout.strip() == str([True] * 5), done.stderr


WITHOUT_DISMISSAL = """
import os
import torch
from squeezed.system import forks
forks._gnu_openmp_libraries = lambda: {"/nowhere/libgomp.so.1"}
torch.set_num_threads(2)
large = torch.randn(700, 700)
(large @ large).softmax(-1)
process = os.fork()
if process == 0:
    (large @ large).softmax(-1)
    os._exit(torch.get_num_threads())
print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_child_works_alone_where_threads_cannot_be_dismissed():
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DISMISSAL],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == "1", done.stderr


BUSY = """
import faulthandler, os, sys, threading, time
import torch
import squeezed
from squeezed.answers.chat import Chat
from tiny import document, tiny_model, tiny_tokenizer

model, tokenizer = tiny_model(), tiny_tokenizer()
path = squeezed.index(model, tokenizer, document(300)).save(sys.argv[1])
context, before = squeezed.load(path, model), model.config._attn_implementation
talk = Chat(model, tokenizer, context, context.cache())
ended = threading.Event()
one_check = squeezed.hf.identity.fingerprint._ONE_CHECK

def wait(*given):
    ended.wait()
    return given[-1] if given else None

def ask(found):
    return squeezed.generate(model, tokenizer, found, "who?", max_new_tokens=3).tokens.tolist()

expected = ask(squeezed.load(path, model))
held = squeezed.load(path, model)
threads = [
    threading.Thread(target=lambda: talk.ask("who?", max_new_tokens=3, logits_processor=[wait])),
    threading.Thread(target=lambda: one_check.__enter__() or wait()),
    threading.Thread(target=lambda: held.layers._one_reader[0].__enter__() or wait()),
]
for thread in threads:
    thread.daemon = True
    thread.start()
time.sleep(2)
child = os.fork()
if child == 0:
    faulthandler.dump_traceback_later(30, exit=True)
    assert model.config._attn_implementation == before
    assert ask(held) == expected
    assert ask(squeezed.load(path, model)) == expected
    assert talk.ask("who?", max_new_tokens=3).tokens.tolist() == expected
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
ended.set()
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_child_of_a_busy_parent_waits_for_no_thread_that_is_not_there(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", BUSY, str(tmp_path / "c.sqz")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.stdout.split() == ["0"], found.stderr


def test_a_lock_that_the_forking_thread_holds_is_held_in_the_child():
    turns, other = Turns(), Turns()
    with turns:
        turns.begin_again()
        other.begin_again()
        with turns:
            pass
    with turns, other:
        pass
    assert isinstance(pickle.loads(pickle.dumps(turns)), Turns)
