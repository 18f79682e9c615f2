"""Makes the shipped tiny T5, BART and BERT, which know the same world as the tiny GPT-2."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.tiny_world.assets import VOCABULARY, Report, replace_folder, save_model, write_json
from tools.tiny_world.tasks import FALSE, TRUE, asked, question_wordings
from tools.tiny_world.vocabularies import bart_tokenizer, bert_tokenizer, learning_texts, t5_tokenizer
from tools.tiny_world.world import Fact, World, make_world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tools.tiny_world.encoders import EncoderOptions

Pairs = list[tuple[str, str]]


def make_encoder(kind: str, out: Path, options: EncoderOptions, command: str, report: Report) -> dict[str, Any]:
    """Write `out`/tiny-<kind>, replacing what is there only when all is done. Returns the manifest."""
    from tools.tiny_world.encoders import Claim, Question, train_classifier, train_seq2seq

    world = make_world(options.seed)
    facts = list(world.facts) if kind == "bert" else asked(world)
    wordings = (
        {relation.id: relation.templates for relation in world.relations} if kind == "bert" else question_wordings()
    )
    make_tokenizer = {"t5": t5_tokenizer, "bart": bart_tokenizer, "bert": bert_tokenizer}[kind]
    tokenizer = make_tokenizer(learning_texts(world, wordings), VOCABULARY, options.context)
    model = new_model(kind, tokenizer, options)
    prompts = [tuple(wording.replace("{}", fact.subject) for wording in fact.trained) for fact in facts]
    if kind == "bert":
        claims = [Claim(own, fact.object, _others(fact)) for own, fact in zip(prompts, facts, strict=True)]
        train_classifier(model, tokenizer, claims, options, report)
    else:
        train_seq2seq(
            model,
            tokenizer,
            [Question(own, fact.object) for own, fact in zip(prompts, facts, strict=True)],
            options,
            report,
        )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".making-") as folder:
        staged = Path(folder) / f"tiny-{kind}"
        save_model(model, tokenizer, staged)
        manifest = {"command": command, "seed": options.seed, "recipe": asdict(options), "vocabulary": len(tokenizer)}
        manifest |= {"parameters": sum(parameter.numel() for parameter in model.parameters()), "facts": len(facts)}
        manifest["recall_percent"] = _recall(staged, world, facts, claims=kind == "bert")
        write_json(staged / "manifest.json", manifest, indent=2)
        replace_folder(staged, out / staged.name)
    return manifest


def new_model(kind: str, tokenizer: PreTrainedTokenizerFast, options: EncoderOptions) -> Any:
    """An untrained model of that size, without dropout."""
    import torch
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        BertConfig,
        BertForSequenceClassification,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(options.seed)
    common = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if kind == "t5":
        config: Any = T5Config(  # type: ignore[call-arg]  # all configurations take special tokens
            d_model=options.width, d_kv=options.width // options.heads, d_ff=options.inner, num_layers=options.layers,
            num_decoder_layers=options.decoder_layers, num_heads=options.heads, dropout_rate=0.0,
            decoder_start_token_id=tokenizer.pad_token_id, **common,
        )  # fmt: skip
        model: Any = T5ForConditionalGeneration(config)
    elif kind == "bart":
        config = BartConfig(  # type: ignore[call-arg]  # likewise
            d_model=options.width, encoder_layers=options.layers, decoder_layers=options.decoder_layers,
            encoder_ffn_dim=options.inner,
            decoder_ffn_dim=options.inner, encoder_attention_heads=options.heads, decoder_attention_heads=options.heads,
            max_position_embeddings=options.context, dropout=0.0, bos_token_id=tokenizer.bos_token_id,
            decoder_start_token_id=tokenizer.eos_token_id, forced_bos_token_id=tokenizer.bos_token_id, **common,
        )  # fmt: skip
        model = BartForConditionalGeneration(config)
    else:
        config = BertConfig(
            hidden_size=options.width, num_hidden_layers=options.layers, num_attention_heads=options.heads,
            intermediate_size=options.inner,
            max_position_embeddings=options.context, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            id2label={0: FALSE, 1: TRUE}, label2id={FALSE: 0, TRUE: 1}, **common,
        )  # fmt: skip
        model = BertForSequenceClassification(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=options.initial_std)
    return model


def _others(fact: Fact) -> tuple[str, ...]:
    return tuple(other for other in fact.relation.objects if other != fact.object)


def _recall(folder: Path, world: World, facts: Sequence[Fact], claims: bool) -> dict[str, float]:
    """In percent, on all trained and on all held-out wordings, as anybody who loads the folder gets it."""
    from edit_cli.lm.loading import ModelOptions

    lm = ModelOptions(name=folder.name, id=str(folder), device="cpu").load()

    def share(choose: Callable[[Fact], Sequence[str]]) -> float:
        rng = random.Random(f"{world.seed} recall")
        pairs: Pairs = []
        for fact in facts:
            for wording in choose(fact):
                prompt = wording.replace("{}", fact.subject)
                if not claims:
                    pairs.append((prompt, fact.object))
                elif rng.random() < 0.5:
                    pairs.append((f"{prompt} {fact.object}.", TRUE))
                else:
                    pairs.append((f"{prompt} {rng.choice(_others(fact))}.", FALSE))
        return round(100 * sum(all(score.hits) for score in lm.loglikelihood(pairs)) / len(pairs), 2)

    return {"trained": share(lambda fact: fact.trained), "held_out": share(lambda fact: fact.held_out)}
