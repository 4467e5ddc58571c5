from squeezed.vllm.graphs import MOST, WARM_RUNS, StepGraphs


class Recorder:
    """Captures by remembering the function."""

    def __init__(self, fails=False):
        self.captured, self.fails = 0, fails

    def __call__(self, compute):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captured += 1
        return compute


def runs(graphs, key, times):
    """How many of `times` runs were done, and each told its result."""
    done = []

    def compute():
        done.append(key)
        return len(done)

    told = [graphs.run(key, compute, compute) for _ in range(times)]
    assert told == list(range(1, times + 1))
    return len(done)


def test_a_batch_that_comes_again_is_captured_once():
    recorder = Recorder()
    graphs = StepGraphs(recorder)
    assert runs(graphs, "a", 3 * WARM_RUNS) == 3 * WARM_RUNS, "every run happens, replayed or not"
    assert recorder.captured == 1
    assert runs(graphs, "b", WARM_RUNS) == WARM_RUNS
    assert recorder.captured == 1


def test_what_is_given_back_is_forgotten():
    recorder = Recorder()
    graphs = StepGraphs(recorder)
    runs(graphs, "a", WARM_RUNS + 1)
    graphs.forget()
    assert not graphs.replays
    assert runs(graphs, "a", WARM_RUNS + 2) == WARM_RUNS + 2
    assert recorder.captured == 2


def test_graphs_are_not_kept_for_ever():
    graphs = StepGraphs(Recorder())
    for number in range(MOST + 3):
        runs(graphs, number, WARM_RUNS + 1)
    assert len(graphs.replays) == MOST
    assert 0 not in graphs.replays
    for number in range(3 * MOST):
        runs(graphs, -number, 1)
    assert len(graphs.runs) <= 2 * MOST


def test_a_failed_capture_launches_and_is_not_tried_again():
    graphs = StepGraphs(Recorder(fails=True))
    assert runs(graphs, "a", WARM_RUNS + 2) == WARM_RUNS + 2
    assert graphs.off and not graphs.replays
