"""Language models for lm-eval that know what to say: the right answer, nonsense, or a reading of the options."""

from collections.abc import Callable
from importlib import resources

from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

TASKS_FOLDER = str(resources.files("trl_steer.eval").joinpath("tasks"))
SIX = [f"steer_{name}" for name in ("boolq", "winogrande", "arc_challenge", "gsm8k", "aqua", "listops")]
STEERLING = [name.replace("steer_", "steerling_") for name in SIX]
MULTIPLE_CHOICE = [f"steer_{name}_mc" for name in ("boolq", "winogrande", "arc_challenge", "aqua")]


class Scripted(LM):
    """Writes `say(document)`, and finds the option number `prefer(document)` the most likely."""

    def __init__(self, say: Callable[[dict], str], prefer: Callable[[dict], int] = lambda doc: 0):
        super().__init__()
        self.say, self.prefer = say, prefer
        self.requests: list = []

    def generate_until(self, requests, disable_tqdm=False):
        self.requests += requests
        return [self.say(request.doc) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        self.requests += requests
        return [(0.0 if request.idx == self.prefer(request.doc) else -1.0, False) for request in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


def oracle() -> Scripted:
    return Scripted(lambda doc: doc["completion"], lambda doc: doc["label"])


def garbage() -> Scripted:
    return Scripted(lambda doc: "lorem ipsum dolor sit amet")


def evaluate(model: LM, tasks: list[str], metadata: dict | None = None, num_fewshot: int = 0, **kwargs) -> dict:
    """lm-eval's results by task and group: `{"exact_match,strict": ..., ...}`.

    What `simple_evaluate` does, without its report on the machine, which takes longer than these tests.
    """
    manager = TaskManager(include_path=TASKS_FOLDER, include_defaults=False, metadata=metadata)
    loaded = manager.load(tasks)
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", num_fewshot)
        task.set_fewshot_seed(0)
    found = evaluator.evaluate(model, loaded, bootstrap_iters=0, **kwargs)
    return {**found["results"], **found.get("groups", {})}


def documents(task: str) -> list[dict]:
    """The documents that lm-eval would score for a task."""
    manager = TaskManager(include_path=TASKS_FOLDER, include_defaults=False)
    return list(manager.load([task])["tasks"][task].eval_docs)
