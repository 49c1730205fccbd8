"""Counts network calls of an attack, to compare with those that it states."""

import torch

from purify import DefendedClassifier
from purify.purification.calls import GRADIENT


class Meter:
    """Network calls by hooks: rows of every network's forward passes, with what is differentiated at its price."""

    def __init__(self, model, monkeypatch):
        self.total, self.inside = 0, None
        details = DefendedClassifier.details

        def metered(model, x, **keys):
            self.enter(model, x)
            found = details(model, x, **keys)
            self.inside = None
            return found

        monkeypatch.setattr(DefendedClassifier, "details", metered)
        for network in (model.purifier.score_model.network, model.classifier):
            network.register_forward_hook(self.network)
        if model.purifier.auxiliary is not None:
            model.purifier.auxiliary.register_forward_hook(self.auxiliary)

    def enter(self, model, x):
        guidance = model.purifier.guidance
        asked = torch.is_grad_enabled() and x.requires_grad
        held = guidance is not None and not guidance.second_order
        self.inside = (GRADIENT, GRADIENT - held) if asked else (1, 1)
        self.once = guidance is not None and guidance.reference == "input"
        self.reference = True

    def network(self, network, inputs, output):
        if torch._C._current_graph_task_id() == -1:  # what is recomputed is in the price
            self.total += len(inputs[0]) * (self.alone(output) if self.inside is None else self.inside[0])

    def auxiliary(self, network, inputs, output):
        if torch._C._current_graph_task_id() != -1:
            return
        if self.inside is None:
            self.total += len(inputs[0]) * self.alone(output)
            return
        # The state's way through the network is gone back at once; that of a reference, which comes first, is not.
        self.total += len(inputs[0]) * self.inside[1] * (1 if self.reference else 2)
        self.reference = not self.once and not self.reference

    @staticmethod
    def alone(output):
        """The price of a pass outside of a purification."""
        return GRADIENT if output.requires_grad else 1


class Passes:
    """Rows of a network's passes as they happen: forward, recomputed and backward."""

    def __init__(self, network):
        self.total = 0
        network.register_forward_hook(self.forward)

    def forward(self, network, inputs, output):
        self.total += len(inputs[0])
        if output.requires_grad:
            output.register_hook(self.back)

    def back(self, gradient):
        self.total += len(gradient)
