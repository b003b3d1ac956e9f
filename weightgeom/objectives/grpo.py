"""Group-relative policy optimization on completions that the policy samples, by TRL's `GRPOTrainer`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from weightgeom.declarations import Role
from weightgeom.interfaces import Scored
from weightgeom.models.loading import check_length
from weightgeom.text.conversation import for_trl
from weightgeom.text.examples import Examples
from weightgeom.text.tokens import tokenized
from weightgeom.training.trainers import check_pairs, own_loss, training_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

SAMPLED = (
    "objective=grpo trains on completions that the policy samples, so that no fixed batch has its gradient"
)


@dataclass(frozen=True)
class GRPO:
    """Policy gradient of a verifiable reward, relative to the mean of a group of completions of one prompt.

    The reward of a completion is `own_words_reward` of the pair that its prompt belongs to: no model judges
    it. A batch has `training.batch_size` completions, in groups of `generations`. There is no penalty on the
    distance from the start, TRL's default (its beta is 0), and so no reference.
    Source: arXiv:2402.03300, eq. 3, with TRL's `loss_type`; the reward is ours.
    """

    generations: int = Field(default=8, ge=2)  # completions of a prompt
    completion: int = Field(default=24, ge=1)  # tokens of a completion, at most
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    loss_type: str = "dapo"

    @property
    def role(self) -> Role:
        """Completions of a group against each other: neither pairs nor the likelihood of a text."""
        return "other"

    def of_text(self, examples: Examples) -> bool:
        """It trains on the prompts of pairs."""
        return False

    @property
    def within_batch(self) -> bool:
        """Rewards are relative to the other completions of the batch."""
        return True

    @property
    def on_policy(self) -> bool:
        """The policy samples the completions."""
        return True

    @property
    def first_loss(self) -> float | None:
        """None: it depends on the lengths of the sampled completions."""
        return None

    def check(self, examples: Examples) -> None:
        """Raise ValueError if the data have no pairs."""
        check_pairs("grpo", examples)

    def trainer(
        self,
        network: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        examples: Examples,
        arguments: Mapping[str, Any],
    ) -> "Trainer":
        """A `GRPOTrainer` on the prompts of the pairs.

        Raises:
            ValueError: if groups do not divide the batch, or a prompt leaves no room for its completion.
        """
        from trl import GRPOConfig, GRPOTrainer

        settings = {**arguments, "include_num_input_tokens_seen": "no"}  # TRL counts the sampled ones itself
        del settings["max_length"]
        adapter = settings.pop("peft_config", None)
        size = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
        if size % self.generations:
            raise ValueError(
                f"objective.generations={self.generations} does not divide a batch of {size} completions: set"
                f" training.batch_size={self.generations * -(-size // self.generations)}"
            )
        longest = max(len(prompt) for prompt, _, _ in tokenized(examples.pairs, tokenizer))
        check_length(longest + self.completion, getattr(network.config, "max_position_embeddings", None))
        pairs = for_trl(examples.pairs, tokenizer)
        columns = {name: [getattr(pair, name) for pair in pairs] for name in ("prompt", "chosen", "rejected")}
        own = {
            "num_generations": self.generations,
            "max_completion_length": self.completion,
            "temperature": self.temperature,
            "loss_type": self.loss_type,
            "beta": 0.0,
        }
        return GRPOTrainer(
            model=network,
            reward_funcs=own_words_reward,
            args=GRPOConfig(**{**settings, **own}),
            train_dataset=training_dataset(columns),
            processing_class=tokenizer,
            peft_config=adapter,
        )

    def scored(self, inputs: Mapping[str, Tensor]) -> Scored:
        """Never: see `on_policy`."""
        raise NotImplementedError(SAMPLED)

    def total_loss(self, trainer: "Trainer", inputs: dict[str, Any]) -> Tensor:
        """The loss summed over the completions of a batch that the trainer has sampled, dimensionless."""
        return own_loss(trainer, inputs) * len(inputs["completion_ids"])


def own_words_reward(
    completions: Sequence[str], chosen: Sequence[str], rejected: Sequence[str], **columns: object
) -> list[float | None]:
    """Share of the chosen response's own words in a completion, minus that of the rejected response's own.

    The own words of a response are those that the other one lacks; of the embedded world, a hedge against an
    assertion, the true value against a false one, or both. In [-1, 1], dimensionless. Source: ours.
    """
    rewards: list[float | None] = []
    for completion, better, worse in zip(completions, chosen, rejected, strict=True):
        words, good, bad = (set(text.split()) for text in (completion, better, worse))
        rewards.append(_share(good - bad, words) - _share(bad - good, words))
    return rewards


def _share(wanted: set[str], words: set[str]) -> float:
    return len(wanted & words) / len(wanted) if wanted else 0.0
