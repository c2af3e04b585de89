"""What all methods with a cache of their own share: the place of the model's forward, its arguments and its outputs."""

from __future__ import annotations

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention import in_place_of
from .errors import LcxError
from .windows import kept_columns, real_tokens


class LongModel:
    """A model that takes inputs of any length. A method says how in `hidden`; labels, logits and masks are the same for all.

    settings: the method's, with defaults filled in. model: the transformers model whose forward `as_forward` replaces.
    """

    def __init__(self, settings, model):
        self.settings, self.model = settings, model
        self._forward = model.forward

    def hidden(self, inputs, real, columns, cache, training: bool):
        """(hidden states [B, wanted columns, hidden], cache) of inputs [B, N] or embeddings [B, N, hidden].

        real: bool [B, N]. columns: int64 [N], see lcx.windows.kept_columns. training: with gradients and without a cache.
        """
        raise TypeError(f"{type(self).__name__} must define hidden")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(hidden)

    def loss(self, logits, labels, **kwargs) -> torch.Tensor:
        return self.model.loss_function(
            logits=logits, labels=labels, vocab_size=self.model.config.vocab_size, **kwargs
        )

    def as_forward(self):
        return in_place_of(self._forward, self.forward)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """What `model(...)` does inside the context. position_ids are counted by the method."""
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if (
            past_key_values is not None and use_cache is False
        ):  # generate passes all tokens so far, at every step
            raise LcxError(
                "past_key_values with use_cache=False would read tokens twice: pass use_cache=True (generate takes it from the config)"
            )
        if any(kwargs.pop(name, None) for name in ("output_attentions", "output_hidden_states")):
            raise LcxError(
                "attentions and hidden states of a windowed model are not returned: leave those options out"
            )
        for name in ("cache_position", "return_dict"):  # older versions of transformers pass them
            kwargs.pop(name, None)
        real = real_tokens(inputs, attention_mask)
        columns = kept_columns(inputs.shape[1], 0 if labels is not None else logits_to_keep, inputs.device)
        training = torch.is_grad_enabled() and past_key_values is None
        training = training and (use_cache is False or labels is not None)
        hidden, cache = self.hidden(inputs, real, columns, past_key_values, training)
        logits, loss = self.logits(hidden), None
        if labels is not None:
            loss = self.loss(logits, labels, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=None if use_cache is False else cache
        )
