"""How an encoder-decoder model answers the two questions. The encoder reads the prompt, the decoder writes the answer.

THE tokenization rule of this head: the prompt is tokenized as any text, with the special tokens that the tokenizer puts
around it, and the answer as a target of its own, without a leading space. The decoder is fed its start token and what
the tokenizer puts before a target; the target's own tokens are scored. The end token is not: every short answer would
get half of its tokens right by it. It does belong to what an edit writes (`Answers` with `end`), so that an edited
answer ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.lm.fast.edits_by_row import meeting
from edit_cli.lm.heads.answers import Answers
from edit_cli.lm.heads.beams import beam_search, distinct
from edit_cli.lm.heads.encoder import EncoderHead
from edit_cli.lm.heads.sampling import Drawn, StopAtNewline, TopKDraws, without_defaults
from edit_cli.lm.hooks import exact, gather_before
from edit_cli.lm.tokenization import Row, by_length, pad_right, told
from edit_cli.writing import bare, joint


@dataclass(frozen=True)
class Answered(Row):
    """A prompt (`ids`) and its answer. before, after: what the tokenizer puts around a target."""

    before: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def target(self) -> tuple[int, ...]:
        return self.answer


class Seq2SeqHead(EncoderHead[Answered]):
    """Encoding, scoring and generation for encoder-decoder models."""

    kind = "seq2seq"
    NAME = "an encoder-decoder"
    beams = 1

    @property
    def classes(self) -> int:
        """What one token of an answer is chosen from."""
        return self.model.config.vocab_size

    @property
    def start(self) -> int:
        """The token that the decoder begins with."""
        for config in (self.model.config, self.model.generation_config):
            if getattr(config, "decoder_start_token_id", None) is not None:
                return config.decoder_start_token_id
        raise UsageError(
            "this encoder-decoder model does not say what its decoder starts with (decoder_start_token_id in"
            " config.json)"
        )

    def written(self, prompt: str, target: str) -> str:
        """The target as it comes out of `generate` after the prompt."""
        return bare(target)

    def encode(self, pairs: Sequence[tuple[str, str | None]], new: int = 0) -> list[Answered]:
        """Tokenize (prompt, target) pairs by this head's rule; a target of None gives a prompt alone.

        Raises:
            RejectedRequest: a prompt that is too long; a target that is empty or becomes no token, or only unknown
                ones; a token that the model has no embedding for.
        """
        rows = self._prompts([prompt for prompt, _ in pairs])
        return [
            Answered(row.ids, row.start, row.offsets, *self._answer(target))
            for row, (_, target) in zip(rows, pairs, strict=True)
        ]

    def _answer(self, target: str | None) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """(before, answer, after) of a target."""
        if target is None:
            return (), (), ()
        text = bare(target)  # a text of its own, so that nothing stands before it
        if not text:
            raise RejectedRequest("target is empty")
        encoded = self.tokenizer(text_target=text, return_special_tokens_mask=True, add_special_tokens=True)
        ids, special = tuple(encoded["input_ids"]), encoded["special_tokens_mask"]
        own = [index for index, added in enumerate(special) if not added]
        if not own:
            raise RejectedRequest(f"target {text!r} becomes no token")
        before, tokens, after = ids[: own[0]], ids[own[0] : own[-1] + 1], ids[own[-1] + 1 :]
        if all(token == self.tokenizer.unk_token_id for token in tokens):
            raise RejectedRequest(f"target {text!r} is unknown to this tokenizer")
        self.vocabulary.refuse(tokens, text)
        return before, tokens, after

    @cached_property
    def lead(self) -> tuple[int, ...]:
        """What the decoder is given before it writes: its start token, and what the tokenizer puts before every
        target.
        """
        encoded = self.tokenizer(text_target="a", return_special_tokens_mask=True, add_special_tokens=True)
        return (self.start, *encoded["input_ids"][: encoded["special_tokens_mask"].index(0)])

    def reply_by_beams(self, count: int) -> None:
        self.beams = count

    def run(self, ids: Tensor, mask: Tensor) -> None:
        """A pass of the prompts alone, for those who read states: the encoder's."""
        self.model.get_encoder()(input_ids=ids, attention_mask=mask)

    def answers(self, rows: Sequence[Answered], end: bool = False) -> Answers:
        """Scores of the rows' answers, and of the end token after each if `end`."""
        wholes = [(*row.before, *row.answer, *(row.after[:1] if end else ())) for row in rows]
        ids, mask = pad_right([row.ids for row in rows], self.pad, self.device)
        fed, _ = pad_right([(self.start, *whole[:-1]) for whole in wholes], self.pad, self.device)
        spans = [range(len(row.before), len(whole)) for row, whole in zip(rows, wholes, strict=True)]
        where = [(number, at) for number, span in enumerate(spans) for at in span]
        at = torch.tensor(where, device=self.device)
        labels = torch.tensor([wholes[number][column] for number, column in where])
        with gather_before(self.model.get_output_embeddings(), at[:, 0], at[:, 1]) as pick:
            output = self.model(input_ids=ids, attention_mask=mask, decoder_input_ids=fed, use_cache=False)
        logits = exact(pick(output.logits))
        return Answers(logits, labels.to(logits.device), at[:, 0].to(logits.device))

    def generate(self, prompts: Sequence[str], max_new_tokens: int, edits: Sequence[int] | None = None) -> list[str]:
        """Greedy answers, or those of `beams`, up to the end token, a line break or `max_new_tokens`."""
        rows = self.encode([(prompt, None) for prompt in prompts])
        texts = [""] * len(rows)
        for batch in told(by_length([len(row.ids) + max_new_tokens for row in rows], self.batch_tokens), self.done):
            with meeting(self, edits and [edits[i] for i in batch]):
                new = self._write([rows[i].ids for i in batch], max_new_tokens)
            for index, ids in zip(batch, new, strict=True):
                texts[index] = self._decode(ids).split("\n")[0]
        return texts

    @torch.no_grad()
    def alternatives(self, prompts: Sequence[str], count: int, max_new_tokens: int) -> list[list[str]]:
        rows = self.encode([(prompt, None) for prompt in prompts])
        found: list[list[str]] = [[] for _ in rows]
        lengths = [(len(row.ids) + max_new_tokens) * count for row in rows]  # beams are written side by side
        for batch in told(by_length(lengths, self.batch_tokens), self.done):
            ids, mask = pad_right([rows[i].ids for i in batch], self.pad, self.device)
            lead = torch.tensor([self.lead] * len(batch), device=self.device)
            beams = beam_search(
                self.model, count, max_new_tokens, self.pad, self._stop_ids(), start=self.start,
                input_ids=ids, attention_mask=mask, decoder_input_ids=lead,
            )  # fmt: skip
            for number, beam in enumerate(beams[:, lead.shape[1] :].tolist()):
                found[batch[number // count]].append(self._decode(beam).split("\n")[0])
        return list(map(distinct, found))

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        max_tokens: int,
        top_k: int,
        edits: Sequence[int] | None = None,
    ) -> list[str]:
        """Prompt and sampled answer, `max_tokens` in all, from the `top_k` likeliest tokens; one seed a row."""
        rows = self.encode([(prompt, None) for prompt in prompts])
        texts = [""] * len(rows)
        for batch in told(by_length([max(max_tokens, len(row.ids)) for row in rows], self.batch_tokens), self.done):
            left = [max(max_tokens - len(rows[i].ids), 0) for i in batch]
            draw = Drawn(TopKDraws([seeds[i] for i in batch], left, top_k), range(len(batch)))
            with meeting(self, edits and [edits[i] for i in batch]):
                new = self._write([rows[i].ids for i in batch], max(left), draw) if max(left) else [[] for _ in batch]
            for index, room, ids in zip(batch, left, new, strict=True):
                texts[index] = prompts[index] + joint(prompts[index], text := self._decode(ids[:room])) + text
        return texts

    @torch.no_grad()
    def _write(self, rows: Sequence[Sequence[int]], steps: int, drawn: Drawn | None = None) -> list[list[int]]:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        ids, mask = pad_right(rows, self.pad, self.device)
        lead = torch.tensor([self.lead] * len(rows), device=self.device)
        beams = 1 if drawn else self.beams
        stops = [] if drawn or beams > 1 else [StopAtNewline(self.tokenizer)]
        config = GenerationConfig(
            max_new_tokens=steps, do_sample=False, num_beams=beams, pad_token_id=self.pad,
            eos_token_id=self._stop_ids(), decoder_start_token_id=self.start, use_cache=True,
        )  # fmt: skip
        with without_defaults(self.model):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                decoder_input_ids=lead,
                generation_config=config,
                logits_processor=LogitsProcessorList([drawn] if drawn else []),
                stopping_criteria=StoppingCriteriaList(stops),
            )
        return output[:, lead.shape[1] :].cpu().tolist()
