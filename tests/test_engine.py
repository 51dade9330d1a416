"""The engine writes what the plain forward pass would, whatever else it writes, and compiles nothing on the way."""

import contextlib
import functools
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few, mesh_of, tiny_config
from networks import answers, make, settings

from llmjax.data.tokenizer import byte_tokenizer
from llmjax.errors import UserError
from llmjax.infer import weights
from llmjax.infer.engine import Engine
from llmjax.infer.request import Request
from llmjax.infer.slots import take_row
from llmjax.parallel import placement

TOKENIZER = byte_tokenizer()
V = 272
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 2},
    "gpt2": {
        "position": "learned",
        "max_length": 64,
        "norm": "layer",
        "activation": "gelu",
        "bias": ("qkv", "out", "mlp", "norm"),
        "tie_embeddings": False,
    },
    "alibi": {"position": "alibi", "block": "parallel"},
    "t5 decoder": {"position": "t5", "norm_place": "sandwich"},
    "gemma": {"pattern": ("local", "global"), "window": 5, "layers": 3, "attention_soft_cap": 20.0, "qk_norm": True},
    "mistral": {"pattern": ("local",), "window": 6},
    "moe": {"moe": {"experts": 4, "active": 2}},
    "rnn": {"pattern": ("rnn",)},
    "lstm": {"pattern": ("lstm",)},
    "rglru": {"pattern": ("rglru",)},
    "mamba2": {"pattern": ("mamba2",), "recurrent": {"state_size": 8, "chunk": 4}},
    "griffin": {"pattern": ("rglru", "rglru", "local"), "layers": 4, "window": 5, "kv_heads": 1},
    "lfm2": {"pattern": ("conv", "global"), "qk_norm": True},
}
# Programs are kept by what they follow from: tests that need no other settings share those of these.
COMMON: dict[str, Any] = {"slots": 2, "length": 64, "chunks": (16, 32), "steps": 4, "weight_format": "stored"}
PROMPTS = [tuple((7 * i + j * j) % 250 + 4 for j in range(n)) for i, n in enumerate((1, 5, 37, 18, 16, 17))]


@functools.cache
def model(name: str = "llama") -> tuple[Any, Any]:
    return make(settings(vocab_size=V, **ARCHITECTURES[name]))


@functools.cache
def plain(name: str) -> Any:
    module, params = model(name)
    return jax.jit(lambda tokens_BL: module.apply({"params": params}, tokens_BL))


def greedy(name: str, ids: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The oracle: the whole text through the network again for every token."""
    row = list(ids)
    for _ in range(count):
        tokens_BL = np.zeros((1, 64), np.int32)
        tokens_BL[0, : len(row)] = row
        logits_V = np.array(plain(name)(tokens_BL)[0, len(row) - 1])
        logits_V[[0, 1, 3, *range(TOKENIZER.vocab_size, V)]] = -np.inf
        row.append(int(np.argmax(logits_V)))
        if row[-1] == TOKENIZER.eos_id:
            break
    return tuple(row[len(ids) :])


SOME = ("moe", "gemma", "gpt2", "mamba2", "rglru", "lfm2")
RARER = ("alibi", "mistral", "lstm", "rnn", "t5 decoder")  # test_model.py decodes with their layers


@pytest.mark.parametrize("name", few(("griffin", "llama", *SOME, *RARER), 1, 1 + len(SOME)))
def test_every_architecture_writes_what_the_plain_forward_pass_would(name):
    """More prompts than slots, of one token to several chunks, one twice, so that slots are used again and rows copied."""
    engine = Engine(*model(name), TOKENIZER, **COMMON | {"chunks": (16,)})
    requests = [Request(ids, 9, temperature=0.0) for ids in (*PROMPTS, PROMPTS[2])]
    for request, answer in zip(requests, answers(engine, requests), strict=True):
        assert answer.tokens == greedy(name, request.ids, 9)


def test_an_engine_releases_all_its_parameters_and_writes_the_same_when_it_has_them_again():
    engine, asked = Engine(*model(), TOKENIZER, **COMMON), [Request(PROMPTS[1], 9, temperature=0.0)]
    (before,) = answers(engine, asked)
    own = {id(leaf) for leaf in jax.tree.leaves(model()[1])}
    held = [weakref.ref(leaf) for leaf in jax.tree.leaves(engine.params) if id(leaf) not in own]
    assert held
    engine.release()
    assert [ref() for ref in held] == [None] * len(held)
    engine.load(model()[1])
    assert answers(engine, asked)[0].tokens == before.tokens


def test_an_encoder_decoder_writes_what_the_plain_forward_pass_would():
    module, params = make(settings(vocab_size=V, encoder_layers=2, position="t5"))
    sources = [tuple(range(5, 5 + n)) for n in (3, 9, 12)]
    engine = Engine(module, params, TOKENIZER, slots=2, length=32, source_length=16, steps=4)
    found = answers(engine, [Request((1,), 8, temperature=0.0, source=source) for source in sources])
    run = jax.jit(lambda tokens, source: module.apply({"params": params}, tokens, source=source))
    for source, answer in zip(sources, found, strict=True):
        given = {"tokens": np.array([source + (0,) * (16 - len(source))])}
        given["segments"] = np.array([[1] * len(source) + [0] * (16 - len(source))])
        row = [1, *answer.tokens]
        logits_LV = np.array(run(np.array([row + [0] * (16 - len(row))]), given)[0])
        logits_LV[:, [0, 1, 3, *range(TOKENIZER.vocab_size, V)]] = -np.inf
        assert answer.tokens == tuple(np.argmax(logits_LV, -1)[: len(answer.tokens)])


@contextlib.contextmanager
def compilations():
    """A list that grows with every program that XLA compiles, or that is read from the cache of compiled programs."""
    seen: list[str] = []

    def listen(name: str, *_: Any, **__: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def random_request(seed: int) -> Request:
    rng = np.random.default_rng(seed)
    ids = tuple(rng.integers(4, 260, rng.integers(1, 40)).tolist())
    return Request(
        ids,
        int(rng.integers(1, 24)),
        temperature=float(rng.choice([0.0, 0.7, 1.5])),
        top_k=int(rng.choice([0, 5, 40])),
        top_p=float(rng.choice([1.0, 0.8])),
        min_p=float(rng.choice([0.0, 0.05])),
        typical_p=float(rng.choice([1.0, 0.9])),
        repetition_penalty=float(rng.choice([1.0, 1.3])),
        frequency_penalty=float(rng.choice([0.0, 0.4])),
        logit_bias={int(rng.integers(4, 260)): 2.0} if rng.random() < 0.3 else {},
        stop=("e",) if rng.random() < 0.3 else (),
        stop_ids=(int(rng.integers(4, 260)),) if rng.random() < 0.3 else (),
        seed=seed,
    )


@pytest.mark.parametrize("count", few([24, 200], slow=0))
def test_requests_that_come_and_go_get_what_they_get_alone(count):
    """Random lengths, settings and cancellations against 8 slots: the same answers, all slots free, nothing compiled."""
    make_engine = functools.partial(Engine, *model(), TOKENIZER, **COMMON | {"slots": 8})
    alone, engine = make_engine(), make_engine()
    compiled = engine.warm_up()
    assert compiled > 0
    rng = np.random.default_rng(count)
    requests = [random_request(i) for i in range(count)]
    numbers, done, told, cancelled, waiting = {}, {}, {}, set(), list(range(count))
    while waiting or engine.busy:
        for _ in range(min(int(rng.integers(0, 4)), len(waiting))):
            i = waiting.pop(0)
            numbers[engine.submit(requests[i])] = i
        if numbers and rng.random() < 0.3:
            number = int(rng.choice(list(numbers)))
            if engine.cancel(number):
                cancelled.add(numbers[number])
        for event in engine.step():
            assert numbers[event.number] not in done
            told.setdefault(numbers[event.number], []).append(event)
            if event.finish:
                done[numbers[event.number]] = event.completion
    for i, answer in done.items():  # events add up
        assert "".join(event.piece for event in told[i]) == answer.text
        assert tuple(token for event in told[i] for token in event.tokens) == answer.tokens
        assert tuple(nats for event in told[i] for nats in event.log_p) == answer.log_probabilities
        assert tuple(nats for event in told[i] for nats in event.sampled_log_p) == answer.sampled_log_probabilities
    assert sorted(done) == list(range(count))
    assert cancelled
    assert engine.programs.compiled() == compiled
    for i, answer in done.items():
        expected = answers(alone, [requests[i]])[0]
        if i in cancelled:
            assert answer.finish == "cancelled"
            assert answer.tokens == expected.tokens[: len(answer.tokens)]
        else:
            assert (answer.tokens, answer.text, answer.finish) == (expected.tokens, expected.text, expected.finish)
            np.testing.assert_allclose(answer.log_probabilities, expected.log_probabilities, atol=1e-4)
    assert engine.programs.compiled() == compiled
    after = answers(engine, [random_request(i) for i in range(8)])  # all slots still serve
    assert [one.tokens for one in after] == [answers(alone, [random_request(i)])[0].tokens for i in range(8)]


@pytest.mark.parametrize("name", few(["llama", "griffin"]))
def test_a_beginning_that_prompts_share_is_prefilled_once(name):
    common, ends = PROMPTS[2][:32], [(5,), (9, 10, 11), PROMPTS[3]]
    requests = [Request(common + end, 6, temperature=0.0) for end in ends]
    engine = Engine(*model(name), TOKENIZER, **COMMON | {"slots": 4, "chunks": (16,)})
    found = answers(engine, requests)
    assert [one.tokens for one in found] == [greedy(name, request.ids, 6) for request in requests]
    assert engine.prefilled == 32 + sum(len(end) - 1 for end in ends)
    samples = [Request(PROMPTS[2], 6, seed=3, number=i) for i in range(4)]
    before = engine.prefilled
    texts = {one.tokens for one in answers(engine, samples)}
    assert len(texts) > 1
    assert engine.prefilled - before <= len(PROMPTS[2]) - 1


def test_prompts_that_wait_are_read_side_by_side_and_those_that_share_a_beginning_after_each_other():
    def calls(requests: list[Request]) -> list[list[int]]:
        """For each call, the tokens read for every row that is no padding."""
        engine = Engine(*model(), TOKENIZER, **COMMON | {"slots": 8})
        seen = []

        def watched(
            params: Any, slots: Any, rows_R: Any, tokens_RL: Any, starts_R: Any, counts_R: Any, *more: Any
        ) -> Any:
            seen.append(sorted(counts_R[rows_R < 8].tolist()))
            return programs.prefill(params, slots, rows_R, tokens_RL, starts_R, counts_R, *more)

        programs = engine.programs
        engine.programs = programs._replace(prefill=watched)
        found = answers(engine, requests)
        assert [one.tokens for one in found] == [greedy("llama", request.ids, 3) for request in requests]
        return seen

    def request(length: int, first: int, **more: Any) -> Request:
        return Request(tuple(range(first, first + length + 1)), 3, temperature=0.0, **more)

    # Six prompts: four short ones at once, the two long ones alone, and the longest one's second part.
    assert calls([request(n, 5 * n) for n in (12, 40, 9, 30, 16, 3)]) == [[3, 9, 12, 16], [30], [32], [8]]
    same = [Request((*range(20, 38), first, 5), 3, temperature=0.0) for first in (50, 51, 52, 53)]
    assert calls(same) == [[19], [3, 3, 3]]  # all but a block of 16 in one call


@pytest.mark.parametrize(
    ("name", "form", "slots"),
    few(
        [
            *(("griffin", "stored", 4), ("moe", "tiles", 4)),
            *(("llama", "stored", 4), ("llama", "tiles", 4), ("griffin", "tiles", 4), ("moe", "stored", 4)),
            ("llama", "stored", 1),
        ],
        keep=2,
    ),
)
def test_a_step_of_decoding_copies_no_cache(name, form, slots):
    """What the program needs beside its arguments is far less than the cache, which it writes where it is."""
    engine = Engine(*model(name), TOKENIZER, slots=slots, length=4096, weight_format=form)
    given = (np.ones(slots, bool), np.full(slots, 8, np.int32), engine._all_BW, np.bool_(False), np.bool_(False))
    lowered = engine.programs.decode.lower(engine.params, engine.slots, *given)
    memory = lowered.compile().memory_analysis()
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.slots.caches[0]["layers"]))
    assert memory.alias_size_in_bytes > cache
    if name != "griffin":  # whose cache is small
        assert memory.temp_size_in_bytes < cache / 2


def test_local_layers_and_recurrent_ones_keep_what_their_window_and_state_need():
    engine = Engine(*model("griffin"), TOKENIZER, slots=2, length=4096)
    layers = engine.slots.caches[0]["layers"]
    assert max(leaf.nbytes for leaf in jax.tree.leaves(layers)) < 2 * 4096


@pytest.mark.parametrize("line", few(["data=2 tensor=2", "fsdp=2 tensor=4"], slow=0))
def test_slots_divided_over_a_mesh_write_the_same(line):
    c = tiny_config(model__init_std=0.3, model__kv_heads=2, model__vocab_size=V, parallel__mesh=line)
    module, params = make(c.model)
    mesh = mesh_of(line)
    placed = jax.device_put(params, placement.parameter_shardings(params, mesh))
    context = functools.partial(placement.active, mesh, c)
    requests = [
        Request(ids, 7, temperature=t, seed=i) for i, (ids, t) in enumerate(zip(PROMPTS, [0, 1] * 3, strict=True))
    ]
    one = Engine(module, params, TOKENIZER, slots=4, length=64, chunks=(16,), weight_format="stored")
    many = Engine(module, placed, TOKENIZER, slots=4, length=64, chunks=(16,), mesh=mesh, context=context)
    expected = [answer.tokens for answer in answers(one, requests)]
    with compilations() as compiled:
        many.warm_up()
        assert compiled
        compiled.clear()
        assert [answer.tokens for answer in answers(many, requests)] == expected
        assert not compiled


def test_log_probabilities_of_the_likeliest_are_those_of_the_model():
    engine = Engine(*model(), TOKENIZER, slots=2, length=64, likeliest=3)
    answer = answers(engine, [Request(PROMPTS[1], 5, temperature=0.0)])[0]
    row = np.zeros((1, 64), np.int32)
    row[0, :10] = [*PROMPTS[1], *answer.tokens]
    expected_LV = jax.nn.log_softmax(plain("llama")(row))[0]
    for i, pairs in enumerate(answer.likeliest):
        values, ids = jax.lax.top_k(expected_LV[4 + i], 3)
        assert [i for i, _ in pairs] == ids.tolist()
        np.testing.assert_allclose([nats for _, nats in pairs], values, atol=1e-4)
        np.testing.assert_allclose(answer.log_probabilities[i], expected_LV[4 + i, answer.tokens[i]], atol=1e-4)


def test_ids_that_end_a_text_end_it_and_are_part_of_its_tokens():
    free = greedy("llama", PROMPTS[1], 9)
    engine = Engine(*model(), TOKENIZER, **COMMON)
    answer = answers(engine, [Request(PROMPTS[1], 9, temperature=0.0, stop_ids=(free[4],))])[0]
    assert answer.tokens == free[: free.index(free[4]) + 1]
    assert answer.finish == "stop"


@pytest.mark.parametrize("name", ["llama", pytest.param("griffin", marks=pytest.mark.slow)])
def test_texts_are_the_same_with_and_without_known_beginnings(name):
    """Conversations, samples and prompts that share a beginning, twice over, against each by itself."""
    stem = PROMPTS[2]
    requests = [Request(stem, 8, seed=1, number=i) for i in range(3)]
    requests += [Request((*stem[:32], 7, 8 + i), 8, seed=i) for i in range(3)]
    apart, shared = (Engine(*model(name), TOKENIZER, **COMMON | {"chunks": (16,)}, prefixes=n) for n in (0, 4))
    first = [one.tokens for one in answers(shared, requests)]
    requests += [Request((*stem, *first[0], 9), 8, seed=5)]
    expected = [one.tokens for one in answers(apart, requests)]
    assert first == expected[:6]
    assert [one.tokens for one in answers(shared, requests)] == expected
    assert shared.prefilled < apart.prefilled


@pytest.mark.parametrize("program", ["decode", "prefill", "place"])
def test_a_step_that_is_interrupted_loses_nothing(program):
    """After a call of a program, before its result is taken, when the arrays it was given are gone already."""
    requests = [Request(ids, 12, seed=i) for i, ids in enumerate(PROMPTS)]
    engine = Engine(*model(), TOKENIZER, **COMMON)
    expected = [one.tokens for one in answers(engine, requests)]
    whole, calls = engine.programs, []

    def interrupted(*given: Any) -> Any:
        calls.append(getattr(whole, program)(*given))
        if len(calls) in (2, 3, 7):
            raise KeyboardInterrupt
        return calls[-1]

    engine.programs = whole._replace(**{program: interrupted})
    numbers = [engine.submit(request) for request in requests]
    done, told = {}, dict.fromkeys(numbers, ())
    while engine.busy:
        with contextlib.suppress(KeyboardInterrupt):
            for event in engine.step():
                told[event.number] += event.tokens
                done[event.number] = event.completion
    assert len(calls) > 7
    assert [done[number].tokens for number in numbers] == expected
    assert [told[number] for number in numbers] == expected


def test_nats_are_of_the_model_and_of_what_was_sampled_from():
    """By hand from the plain forward pass: bias, repetition penalty, temperature, top-k, then top-p."""
    bias, options = {50: 1.5, 60: -np.inf}, {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "repetition_penalty": 1.3}
    engine = Engine(*model(), TOKENIZER, **COMMON)
    request = Request(PROMPTS[3], 8, seed=3, logit_bias=bias, **options)
    answer = answers(engine, [request])[0]
    for i, token in enumerate(answer.tokens):
        row = [*request.ids, *answer.tokens[:i]]
        logits_V = np.array(plain("llama")(np.array([row + [0] * (64 - len(row))]))[0, len(row) - 1], np.float64)
        np.testing.assert_allclose(answer.log_probabilities[i], _log_softmax(logits_V)[token], atol=1e-4)
        logits_V[[0, 1, 3, *range(TOKENIZER.vocab_size, V)]] = -np.inf
        for j, value in bias.items():
            logits_V[j] += value
        seen = sorted(set(row))
        logits_V[seen] = np.where(logits_V[seen] > 0, logits_V[seen] / 1.3, logits_V[seen] * 1.3)
        logits_V /= 0.7
        logits_V[logits_V < np.sort(logits_V)[-40]] = -np.inf
        order = np.argsort(-logits_V)
        mass = np.cumsum(np.exp(_log_softmax(logits_V))[order])
        logits_V[order[np.searchsorted(mass, 0.8) + 1 :]] = -np.inf
        np.testing.assert_allclose(answer.sampled_log_probabilities[i], _log_softmax(logits_V)[token], atol=1e-3)
    greedy_one = answers(engine, [Request(PROMPTS[3], 4, temperature=0.0)])[0]
    assert greedy_one.sampled_log_probabilities == (0.0,) * 4  # what is certain


def _log_softmax(logits_V: np.ndarray) -> np.ndarray:
    shifted_V = logits_V - logits_V.max()
    return shifted_V - np.log(np.exp(shifted_V).sum())


def test_other_parameters_are_taken_without_compiling_anything():
    module, params = model()
    other = jax.tree.map(lambda x: x * 1.5, params)
    engine = Engine(module, params, TOKENIZER, slots=2, length=64, chunks=(16,))
    requests = [Request(ids, 8, temperature=0.0) for ids in PROMPTS]
    expected = [
        one.tokens for one in answers(Engine(module, other, TOKENIZER, slots=2, length=64, chunks=(16,)), requests)
    ]
    before = [one.tokens for one in answers(engine, requests)]
    assert before != expected
    read = engine.prefilled
    answers(engine, requests[-1:])
    assert engine.prefilled == read  # it is in a slot
    number = engine.submit(requests[0])
    with pytest.raises(UserError, match="being written"):
        engine.load(other)
    engine.cancel(number)
    assert [one.finish for _, one in engine.run()] == ["cancelled"]
    with compilations() as compiled:
        engine.load(other, version=7)
        assert [one.tokens for one in answers(engine, requests)] == expected
        engine.load(params, version=8)
        assert [one.tokens for one in answers(engine, requests)] == before
    assert not compiled
    assert engine.version == 8
    with pytest.raises(UserError, match="of another model"):
        engine.load(model("gpt2")[1])


# Weights

QUICK = (("gpt2", "tiles"), ("moe", "int8"))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=[] if (name, form) in QUICK else [pytest.mark.slow])
        for name in ("llama", "gpt2", "griffin", "mamba2", "moe")
        for form in ("tiles", "int8")
    ],
)
def test_forms_of_weights_give_the_logits_of_the_parameters_they_stand_for(name, form):
    module, params = model(name)
    tokens_BL = jax.random.randint(jax.random.key(0), (8, 12), 4, 260)
    prepared, own = weights.prepare(module, params, form)
    run = jax.jit(lambda own, tokens: prepared.apply({"params": own}, tokens))
    with weights.computing():
        found, many = run(own, tokens_BL[:2]), run(own, tokens_BL)  # more rows than tiles are for
    untied, params = weights.untied(module, params)
    if form == "int8":
        params = jax.jit(functools.partial(weights.dequantized, untied))(params)
    expected = jax.jit(untied.apply)({"params": params}, tokens_BL)
    np.testing.assert_allclose(found, expected[:2], atol=1e-4 * float(jnp.abs(expected).max()))
    np.testing.assert_allclose(many, expected, atol=1e-4 * float(jnp.abs(expected).max()))


def test_int8_is_a_quarter_of_the_bytes_and_near_the_logits():
    module, params = model("gpt2")
    _, own = weights.prepare(module, params, "int8")
    matrix, low = params["layers"]["mlp"]["up"]["kernel"], own["layers"][0]["mlp"]["up"]
    assert matrix.nbytes / 2 == 4 * low["kernel"].nbytes  # of two layers
    assert low["scale"].nbytes == 4 * matrix.shape[2]
    tokens_BL = jax.random.randint(jax.random.key(0), (2, 12), 4, 260)
    run = jax.jit(lambda params: module.apply({"params": params}, tokens_BL))
    exact, rounded = run(params), run(jax.jit(functools.partial(weights.dequantized, module))(params))
    error = float(jnp.sqrt(jnp.mean((exact - rounded) ** 2) / jnp.var(exact)))
    assert 0 < error < 0.05


def test_int8_is_a_quarter_of_the_bytes_of_experts_too():
    module, params = model("moe")
    _, own = weights.prepare(module, params, "int8")
    for name in ("up", "gate", "down"):
        matrix, low = params["layers"]["moe"][name]["kernel"], own["layers"][1]["moe"][name]
        assert (low["kernel"].dtype, low["kernel"].shape) == (np.int8, matrix.shape[1:])
        np.testing.assert_allclose(
            low["kernel"] * np.asarray(low["scale"])[:, None], matrix[1], atol=float(low["scale"].max()) / 1.9
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunks": (20,)}, "multiples of 16"),
        ({"slots": 0}, "slots=0"),
        ({"source_length": 8}, "encoder-decoders"),
        ({"weight_format": "int3"}, "weights='int3'"),
        ({"draft": model()}, "ahead=0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Engine(*model(), TOKENIZER, length=64, **changes)


def test_requests_that_cannot_be_answered_are_refused():
    engine = Engine(*model(), TOKENIZER, slots=1, length=32)
    for given, message in (
        ({"ids": [5] * 30}, "more than the 32 that a slot"),
        ({"ids": [5, 300]}, "ids from 0 to 271"),
        ({"stop_ids": list(range(4, 20))}, "ids end the text"),
        ({"logit_bias": {999: 1.0}}, "logit_bias has the id 999"),
        ({"logit_bias": dict.fromkeys(range(V), -np.inf)}, "forbids every token"),
        ({"source": [4]}, "source has 1 tokens"),
        ({"temperature": "hot"}, "temperature='hot'"),
    ):
        with pytest.raises(UserError, match=message):
            engine.submit({"ids": [5], "max_new_tokens": 3, **given})
    assert not engine.busy


def test_a_row_taken_from_the_slots_is_a_copy():
    engine = Engine(*model(), TOKENIZER, **COMMON)
    row = engine.programs.take_row(engine.slots.caches, np.int32(1))
    answers(engine, [Request(PROMPTS[1], 4)])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(row))
    assert jax.tree.structure(row) == jax.tree.structure(jax.eval_shape(take_row, engine.slots.caches, 0))
