"""Published scaling laws and rules as functions. This project fitted none of them.

Losses are in nats a token of the papers' own data and tokenizers, so they do not compare with each other.
"""

import math
from dataclasses import dataclass

import numpy as np

PETAFLOP_DAY = 8.64e19  # FLOPs


# ------------------------------------------------------------------ losses


def kaplan_loss(parameters: float, tokens: float) -> float:
    """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (Kaplan et al. 2020, eq. 1.5).

    N counts no embeddings. Its optimum grows as N ~ C^0.73, which Hoffmann et al. (2022) found to come from schedules that
    did not end with the run, and Porian et al. (2024) from the head's FLOPs, the warm-up and untuned rates.
    """
    return float(((8.8e13 / parameters) ** (0.076 / 0.095) + 5.4e13 / tokens) ** 0.095)


def kaplan_compute(flops: float) -> tuple[float, float]:
    """(the loss, the best parameters without embeddings) for training FLOPs (Kaplan et al. 2020, eqs. 1.3 and 1.7)."""
    days = flops / PETAFLOP_DAY
    return float((3.1e8 / days) ** 0.050), 1.3e9 * days**0.73


def critical_batch(loss: float) -> float:
    """Tokens of a batch beyond which more of them save few steps: 2e8 L^(-1 / 0.21) (Kaplan et al. 2020, eq. 5.3)."""
    return float(2e8 * loss ** (-1 / 0.21))


@dataclass(frozen=True)
class DataConstrained:
    """L(N, D, U) where only U tokens are unique and the others repeat them (Muennighoff et al. 2023).

    Repeated tokens count for less and less, and so do parameters beyond those that U tokens can train.
    """

    E: float = 1.87
    A: float = 521.0
    B: float = 1488.0
    alpha: float = 0.353
    beta: float = 0.353
    data_half: float = 15.4  # R_D: repetitions after which another is worth 1 / e of a fresh one
    size_half: float = 5.3  # R_N: the same for parameters

    def effective_tokens(self, tokens: np.ndarray | float, unique: np.ndarray | float) -> np.ndarray:
        """D' = U + U R_D (1 - exp(-R / R_D)), R being the repetitions after the first epoch."""
        unique = np.minimum(unique, tokens)
        repeated = np.asarray(tokens, float) / unique - 1
        return unique * (1 + self.data_half * (1 - np.exp(-repeated / self.data_half)))

    def effective_parameters(self, parameters: np.ndarray | float, unique: np.ndarray | float) -> np.ndarray:
        """N' likewise, against the parameters for which U tokens are the best length."""
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        fitting = np.asarray(unique, float) ** (self.beta / self.alpha) * g ** ((self.alpha + self.beta) / self.alpha)
        base = np.minimum(fitting, parameters)
        excess = np.maximum(np.asarray(parameters, float) / base - 1, 0)
        return base * (1 + self.size_half * (1 - np.exp(-excess / self.size_half)))

    def loss(
        self, parameters: np.ndarray | float, tokens: np.ndarray | float, unique: np.ndarray | float
    ) -> np.ndarray:
        n, d = self.effective_parameters(parameters, unique), self.effective_tokens(tokens, unique)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta


# ------------------------------------------------------------------ rates and batches


@dataclass(frozen=True)
class Rule:
    """A learning rate or a batch in tokens that a paper gives for a size."""

    name: str
    rate: float | None
    batch_tokens: float | None
    source: str


def step_law(parameters: float, tokens: float) -> Rule:
    """AdamW's rate 1.79 N^-0.713 D^0.307 and a batch of 0.58 D^0.571 tokens (Li et al. 2025, "Step Law").

    Fitted to dense models of 0.2B to 1.1B parameters without embeddings, 2B to 100B tokens, with the final rate fixed at
    1e-5.
    """
    rate = 1.79 * parameters**-0.713 * tokens**0.307
    return Rule("Step Law", rate, 0.58 * tokens**0.571, "Li et al. 2025")


def deepseek(flops: float) -> Rule:
    """The rate 0.3118 C^-0.125 and a batch of 0.292 C^0.3271 tokens (DeepSeek LLM, Bi et al. 2024)."""
    return Rule("DeepSeek", 0.3118 * flops**-0.1250, 0.2920 * flops**0.3271, "Bi et al. 2024")


def power_lines(tokens: float) -> Rule:
    """A batch that grows as D^0.383 (Bergsma et al. 2025), through 2^19 tokens at 10B, which is assumed here."""
    return Rule("Power Lines", None, 2.0**19 * (tokens / 1e10) ** 0.383, "Bergsma et al. 2025; the anchor is assumed")


def rules(parameters: float, tokens: float) -> list[Rule]:
    """Every rule's rate and batch for a training."""
    return [step_law(parameters, tokens), deepseek(6.0 * parameters * tokens), power_lines(tokens)]


def round_batch(tokens: float, *, length: int) -> int:
    """Rows of a batch of about so many tokens: the nearest power of two, at least 1."""
    return max(1, 2 ** round(math.log2(max(tokens / length, 1.0))))
