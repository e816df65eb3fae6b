"""Classes of a user's own, as a configuration names them, that refuse to work or have a defect."""

from lightning.pytorch import Callback


class Refuses(Callback):
    def __init__(self, size: int = 1, name: str = "x"):
        if size % 2:
            raise ValueError("an even number is needed\nhere")


class Unannotated:
    def build(self):
        raise NotImplementedError


class Missing(Callback):
    def __init__(self):
        import no_such_library  # noqa: F401


class Defective(Callback):
    def __init__(self):
        {}["key"]  # noqa: B018


class RefusesSetup(Callback):
    def setup(self, trainer, module, stage):
        raise RuntimeError("no server at nowhere")


class FailsInTraining(Callback):
    def on_train_batch_start(self, *_):
        raise ValueError("step by step, somewhere deep in the loop")
