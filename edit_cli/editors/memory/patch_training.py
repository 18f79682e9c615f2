"""How T-Patcher's neurons begin, what their losses are, and how they are trained (Huang et al., 2023, §4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HIGHEST = 30.0  # exponents are clamped here: a large learning rate would overflow them
FIRST_CHECK, CHECK = 100, 25  # steps
ENOUGH = 1.0e-3  # by so much the loss on the validation memory must fall from check to check


@dataclass(kw_only=True)
class PatchTraining:
    """L = l_e + a · l_a + m (l_m1 + l_m2); the fields are those of `TPatcher`."""

    activation_weight: float = 1.0
    memory_weight: float = 10.0
    beta: float = -3.0
    gamma: float = 3.0
    top_activation: int = 5
    top_memory: int = 1000
    pooled: bool = False
    lr: float = 1.0e-2
    weight_decay: float = 1.0e-2
    clip: float = 5.0
    steps: int = 2000

    def train(
        self,
        neurons: Neurons,
        queries: Tensor,
        memory: Sequence[Tensor],
        validation: Sequence[Tensor],
        fit: Callable[[Neurons], tuple[Tensor, Callable[[], bool]]],
    ) -> None:
        """Stops once the fact is right and the loss on the validation memory has stopped falling.

        fit: l_e of the neurons, and a question whether the fact is right with them.
        """
        flat = torch.nn.Parameter(neurons.joined())
        optimizer = torch.optim.Adam([flat], lr=self.lr, weight_decay=self.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=0.05)
        best: float | None = None
        parts = neurons.take(flat)
        for step in range(self.steps):
            edit_loss, right = fit(neurons)
            if step >= FIRST_CHECK and step % CHECK == 0 and right():
                with torch.no_grad():
                    present = float(self.memory_losses(neurons, queries, validation))
                if best is not None and present > best - ENOUGH:
                    break
                best = present if best is None else min(best, present)
            if step and step % CHECK == 0:
                schedule.step(edit_loss.detach())
            loss = edit_loss + self.activation_weight * self.activation_loss(neurons, queries)
            loss = loss + self.memory_weight * self.memory_losses(neurons, queries, memory)
            flat.grad = torch.cat(torch.autograd.grad(loss, parts), dim=1)
            flat.grad.mul_((self.clip / (flat.grad.norm() + 1e-6)).clamp(max=1.0))
            optimizer.step()

    def activation_loss(self, neurons: Neurons, queries: Tensor) -> Tensor:
        """l_a: each neuron answers to its own mistake."""
        return top_exp(-neurons.own(queries)[None], self.top_activation).mean()

    def memory_losses(self, neurons: Neurons, queries: Tensor, memory: Sequence[Tensor]) -> Tensor:
        """l_m1 + l_m2: on everything else it stays below β, and by γ below what it says of its mistake.

        memory: parts (·, d_in).

        Of one neuron both average the same terms, the largest exp(M k + b), but for a factor: exp(−β), and
        exp(γ − own).
        """
        said = (
            torch.cat([neurons.keys @ part.T for part in memory], dim=1)
            if len(memory) > 1
            else neurons.keys @ memory[0].T
        )
        if self.pooled:
            said = said + neurons.biases
            margins = said - self.beta, said - neurons.own(queries)[:, None] + self.gamma
            return torch.cat([top_exp(terms.reshape(1, -1), self.top_memory) for terms in margins]).sum()
        loudest = top_exp(said + neurons.biases, self.top_memory)
        return (
            loudest
            * (torch.exp(loudest.new_tensor(-self.beta)) + (self.gamma - neurons.own(queries)).clamp(max=HIGHEST).exp())
        ).mean()


@dataclass
class Neurons:
    """New neurons while they are trained: keys (n, d_in), biases (n, 1), and values w ⊙ a, (n, d_out) each."""

    keys: Tensor
    biases: Tensor
    weights: Tensor
    scales: Tensor

    def joined(self) -> Tensor:
        """(n, …) of all parameters."""
        return torch.cat([self.keys, self.biases, self.weights, self.scales], dim=1).detach()

    def take(self, flat: Tensor) -> list[Tensor]:
        """Be views of `flat`, which is `joined`, from now on; the parameters, for gradients."""
        shares = flat.detach().split(
            [part.shape[1] for part in (self.keys, self.biases, self.weights, self.scales)], dim=1
        )
        self.keys, self.biases, self.weights, self.scales = parts = [share.requires_grad_() for share in shares]
        return parts

    @property
    def values(self) -> Tensor:
        return self.weights * self.scales

    def activations(self, queries: Tensor) -> Tensor:
        """(…, n), before the activation function, of queries (…, d_in)."""
        return queries @ self.keys.T + self.biases[:, 0]

    def own(self, queries: Tensor) -> Tensor:
        """(n,): of each neuron on its own mistake, queries (n, d_in)."""
        return (queries * self.keys).sum(1) + self.biases[:, 0]


def begun(queries: Tensor, width: int, scale: float, seeds: list[int]) -> Neurons:
    """k = q / ‖q‖², so that the pre-activation is 1; v = w ⊙ a, w ~ N(0, 1) drawn from a seed a neuron, a = `scale`.

    queries (n, d_in).
    """
    draws = [torch.randn(width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    weights = torch.stack(draws).to(queries) if draws else queries.new_zeros(0, width)
    keys = queries / queries.square().sum(1, keepdim=True)
    return Neurons(keys, queries.new_zeros(len(queries), 1), weights, torch.full_like(weights, scale))


def top_exp(values: Tensor, count: int) -> Tensor:
    """(n,): S(v; κ), the mean of the κ largest of exp(v) in each row of `values` (n, m)."""
    return values.topk(min(count, values.shape[1]), dim=1, sorted=False).values.clamp(max=HIGHEST).exp().mean(1)
