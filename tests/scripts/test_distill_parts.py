"""The parts of scripts/distill whose right answer is known: loss, candidates, figures, text, openings."""

import io
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from scripts.distill.draft import Draft
from scripts.distill.errors import DistillError
from scripts.distill.evaluation import evaluate
from scripts.distill.loss import (
    SAMPLED_TOKENS,
    Candidates,
    distillation_loss,
    draft_log_probs,
    draw_candidates,
)
from scripts.distill.output import check_output_vocabulary, frequent_ids
from scripts.distill.progress import Progress
from scripts.distill.target import opening_ids
from scripts.distill.text import Text, joined, load_text, split
from scripts.distill.training import ACCEPTANCE_WEIGHT, LEARNING_RATE, acceptance_weight, learning_rate
from tests.decoding.checkpoints import VOCAB_SIZE, random_model, save_tokenizer

LARGE_VOCABULARY = 40_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text_of(sequences: int = 4, tokens: int = 6, stored: int = 3, seed: int = 0) -> Text:
    source = generator(seed)
    logits = torch.randn(sequences, tokens, VOCAB_SIZE, generator=source)
    log_probs, ids = logits.log_softmax(-1).topk(stored)
    token_ids = torch.randint(VOCAB_SIZE, (sequences, tokens), generator=source)
    return Text(token_ids.int(), ids.int(), log_probs.half())


def test_normaliser_of_the_candidates_is_unbiased() -> None:
    hidden, head = (
        0.3 * torch.randn(3, 8, generator=generator()),
        torch.randn(LARGE_VOCABULARY, 8, generator=generator(1)),
    )
    top_ids = torch.tensor([[5, 9], [7, 5], [30_000, 2]])
    exact = (hidden @ head.T).logsumexp(-1)
    found = []
    for seed in range(50):
        candidates = draw_candidates(top_ids, torch.arange(20), LARGE_VOCABULARY, generator(seed))
        assert len(candidates.token_ids) == len({*top_ids.flatten().tolist(), *range(20)}) + SAMPLED_TOKENS
        log_q = draft_log_probs(hidden, head, top_ids, candidates)
        found.append(((hidden @ head.T).gather(1, top_ids) - log_q)[:, 0].exp())
    torch.testing.assert_close(torch.stack(found).mean(0), exact.exp(), rtol=0.05, atol=0.0)


def test_candidates_of_a_small_vocabulary_are_all_of_it() -> None:
    hidden, head = torch.randn(2, 4), torch.randn(30, 4)
    top_ids = torch.tensor([[3], [4]])
    candidates = draw_candidates(top_ids, torch.tensor([7]), 30, generator())
    assert sorted(candidates.token_ids.tolist()) == list(range(30))
    exact = (hidden @ head.T).log_softmax(-1).gather(1, top_ids)
    torch.testing.assert_close(draft_log_probs(hidden, head, top_ids, candidates), exact)


def test_candidates_may_have_no_rest() -> None:
    candidates = draw_candidates(torch.tensor([[0]]), torch.arange(4), 4, generator())
    assert isinstance(candidates, Candidates)
    assert (candidates.token_ids.tolist(), candidates.shift.tolist()) == ([0, 1, 2, 3], [0.0] * 4)


def test_loss_is_cross_entropy_with_a_tail_then_the_acceptance() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.0]]), torch.tensor([[0.2, 0.4, 0.1]])
    log_p = torch.tensor([[math.log(0.5), math.log(0.3), -math.inf]])
    loss, acceptance = distillation_loss(q.log(), log_p, 0.0)
    expected = -(0.5 * math.log(0.2) + 0.3 * math.log(0.4) + 0.2 * math.log(0.4))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(acceptance) == pytest.approx(0.5)
    assert float(distillation_loss(q.log(), log_p, 1.0)[0]) == pytest.approx(-1.0)
    assert p.sum() < 1


def test_loss_is_least_where_the_draft_is_the_target() -> None:
    logits = torch.zeros(1, 4, requires_grad=True)
    target = torch.tensor([[0.4, 0.3, 0.2]])
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for step in range(400):
        loss, _ = distillation_loss(logits.log_softmax(-1)[:, :3], target.log(), 0.5 * (step > 200))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    torch.testing.assert_close(logits.softmax(-1)[:, :3], target, atol=0.02, rtol=0.0)


def test_schedules() -> None:
    assert learning_rate(0, 0.0) < learning_rate(10_000, 0.0) == LEARNING_RATE
    assert learning_rate(10_000, 1.5) == learning_rate(10_000, 1.0) == pytest.approx(0.02 * LEARNING_RATE)
    assert [acceptance_weight(done) for done in (0.0, 0.3, 0.75, 1.0)] == [
        0.0,
        0.0,
        ACCEPTANCE_WEIGHT,
        ACCEPTANCE_WEIGHT,
    ]
    assert 0 < acceptance_weight(0.5) < ACCEPTANCE_WEIGHT


@pytest.mark.parametrize("output_ids", [None, torch.arange(0, VOCAB_SIZE, 2)])
def test_figures_equal_a_plain_loop(output_ids: Tensor | None) -> None:
    draft = Draft(random_model("llama"), torch.tensor([1, 4]), VOCAB_SIZE)
    text = text_of()
    found = evaluate(draft, text, output_ids)
    inputs = torch.cat([torch.tensor([[1, 4]]).expand(len(text), -1), text.token_ids], dim=1)
    with torch.no_grad():
        logits = draft.module(input_ids=inputs).logits[:, 1:-1]
    if output_ids is not None:
        outside = torch.ones(VOCAB_SIZE, dtype=torch.bool)
        outside[output_ids] = False
        logits = logits.masked_fill(outside, -math.inf)
    q = logits.softmax(-1)
    accepted, same, among = [], [], []
    for sequence in range(len(text)):
        for position in range(text.token_ids.shape[1]):
            ids, law = text.top_ids[sequence, position].long(), q[sequence, position]
            p = text.top_log_probs[sequence, position].float().exp()
            accepted.append(float(torch.minimum(p, law[ids]).sum()))
            best = law.topk(4).indices.tolist()
            same.append(best[0] == int(ids[0]))
            among.append(int(ids[0]) in best)
    assert found.acceptance == pytest.approx(sum(accepted) / len(accepted), rel=1e-4)
    assert (found.top_1, found.top_4) == pytest.approx((sum(same) / len(same), sum(among) / len(among)))
    assert found.positions == len(accepted)
    assert found.acceptance <= found.ceiling <= 1


def test_cut_keeps_special_ids_and_the_most_frequent() -> None:
    text = Text(
        torch.tensor([[4, 4, 5], [4, 5, 9]]),
        torch.full((2, 3, 1), 8),
        torch.full((2, 3, 1), math.log(0.4)),
    )
    assert frequent_ids(text, 5, [0, 2], 12).tolist() == [0, 2, 4, 5, 8]
    with pytest.raises(DistillError, match="--output-vocabulary is 2; give a number between 3 "):
        check_output_vocabulary(2, [0, 2], 12)


def test_text_survives_its_file(tmp_path: Path) -> None:
    text = text_of()
    text.save(tmp_path / "text.npz")
    loaded = load_text(tmp_path / "text.npz", VOCAB_SIZE)
    assert loaded is not None
    for name in ("token_ids", "top_ids", "top_log_probs"):
        assert torch.equal(getattr(loaded, name), getattr(text, name))
    assert [path.name for path in tmp_path.iterdir()] == ["text.npz"]


def test_files_with_fewer_stored_tokens_are_filled_with_probability_zero() -> None:
    whole = joined([text_of(stored=3), text_of(stored=5, seed=1)])
    assert whole.top_ids.shape == whole.top_log_probs.shape == (8, 6, 5)
    assert torch.equal(whole.top_log_probs[:4, :, 3:].exp(), torch.zeros(4, 6, 2, dtype=torch.float16))
    with pytest.raises(DistillError, match=r"sequences of \[6, 7\] tokens"):
        joined([text_of(), text_of(tokens=7)])


def test_held_out_text_is_apart_and_spread() -> None:
    text = text_of(sequences=100)
    training, held_out = split(text)
    assert (len(training), len(held_out)) == (95, 5)
    rows = {tuple(row) for row in training.token_ids.tolist()}
    assert not rows & {tuple(row) for row in held_out.token_ids.tolist()}
    with pytest.raises(DistillError, match="one sequence cannot be split"):
        split(text_of(sequences=1))


TEMPLATES = {
    "{{ bos_token }} w5 {% for m in messages %}{{ m.content }}{% endfor %} w6": [1, 5],
    "w5 w6 {{ messages[0].content }}": [5, 6],
    "{{ messages[0].content }}": [1],
    "w5": [1],
    "{{ raise_exception('no') }}": [1],
    None: [1],
}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


@pytest.mark.parametrize("template", TEMPLATES)
def test_opening_is_the_template_up_to_the_users_words(
    template: str | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = template
    assert opening_ids(tokenizer) == TEMPLATES[template]


def test_target_without_any_start_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    with pytest.raises(DistillError, match="no chat template, BOS or EOS token"):
        opening_ids(bare)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    progress = Progress(stream)
    monkeypatch.setattr("scripts.distill.progress.SECONDS_BETWEEN_UPDATES", 0.0)
    progress.show("sampling", tokens=12_000, seconds=60, left=754.6)
    progress.show("sampling", tokens=24_000, seconds=60, left=-1)
    assert stream.getvalue().split("\r")[1:] == [
        "sampling: 12,000 tokens, 200 tokens/s, 12:35 left",
        "sampling: 24,000 tokens, 400 tokens/s, 0:00 left ",
    ]


def test_progress_writes_few_lines_elsewhere() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    for _ in range(3):
        progress.show("training", tokens=10, seconds=1, left=5, note=", well")
    progress.say("done")
    assert stream.getvalue() == "training: 10 tokens, 10 tokens/s, 0:05 left, well\ndone\n"
