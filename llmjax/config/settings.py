"""All settings: the base that config files start from. `llmjax config` prints this list with its comments."""

import re
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

# fmt: off


def _data(c: ConfigDict) -> None:
    c.data = ConfigDict()
    c.data.sources = ("stdlib",)  # "stdlib", "stdlib-tests" (conversations: "stdlib-answers", "stdlib-pairs", "stdlib-prompts"), files, folders, globs; "name=path" names a source; "fr|de=a.txt|b.txt" is parallel lines
    c.data.format = "text"  # what sources hold: text, or conversations (answers, preferences, prompts; see data/conversations.py)
    c.data.turns = "all"  # conversations: turns of the assistant that are learnt, all or the last
    c.data.chat_template = ""  # conversations: the Jinja template to write them by, or a file with it; "": the tokenizer's own
    c.data.pack = True  # conversations: rows hold as many of them as fit; off: one each
    c.data.share_prompts = False  # answers to one prompt, of a pair or of a policy's group, share a row that holds the prompt once
    c.data.rejected_percent = 20.0  # conversations: more unusable rows than this share are an error
    c.data.text_field = "text"  # the field of rows that holds the text; "content.text" is the field text of content
    c.data.min_bytes = 16  # shorter documents, in UTF-8 bytes, are rejected
    c.data.holdout_percent = 2.0  # share of document groups held out for evaluation, chosen by a hash of the group's name
    c.data.holdout_max_bytes = 0  # larger groups stay in training; 0: no limit
    c.data.holdout_tail_percent = 0.0  # instead: hold out the end of every document (nanoGPT's Shakespeare split)
    c.data.shard_bytes = 64_000_000  # size of a shard of clean documents, in UTF-8 bytes of text
    c.data.record_tokens = 4096  # tokens in a record of a token shard; does not limit the sequence length
    c.data.mixture = ()  # weights by source over training: ("0%: stdlib=1 notes=1", "80%: notes=1"); empty: by size
    c.data.mixture_temperature = 1.0  # without data.mixture: a source weighs size ** this (1: by size, 0: all alike)
    c.data.replay = ()  # continued pretraining: the sources of general text; the others are the domain, and both are measured
    c.data.replay_percent = 10.0  # of the rows that are general text; 0: it is measured, not trained on
    c.data.max_epochs = 0.0  # no source is read more often; the others fill its place; 0: no limit


def _prepare(c: ConfigDict) -> None:
    c.prepare = ConfigDict()
    c.prepare.steps = ("exact",)  # in this order, such as ("repair", "language", "exact", "near"); the error about an unknown name lists all steps
    c.prepare.html = "main"  # of web pages: main (the main content), all (all visible text), raw
    c.prepare.pdf_margins = True  # leave out repeated headers and footers of PDFs, and join hyphenated lines
    c.prepare.encodings = ("utf-8",)  # tried in this order; "detect" as the last guesses from the bytes
    c.prepare.max_document_bytes = 256_000_000  # a larger text is cut at line ends, another larger document is rejected
    c.prepare.max_document_seconds = 60.0  # CPU time to extract the text of one document: what takes more is rejected; 0: no limit
    c.prepare.normal_form = "NFC"  # repair: NFC, NFKC or none
    c.prepare.emoji = "names"  # emoji: names (":red_heart:" in the document's language), remove, keep
    c.prepare.emoticons = False  # emoji: also ":-)" and its like
    c.prepare.spelling = "en_US"  # spelling: the speller's language
    c.prepare.languages = ()  # language: those kept, such as ("en", "de"); empty: all
    c.prepare.language_threshold = 0.65  # language: less certain documents are rejected, if languages are chosen
    c.prepare.words = "spacy_compat"  # quality rules: what a word is: spacy_compat (as published) or unicode (runs of letters and digits, faster)
    c.prepare.c4_end_marks = True  # c4: lines that do not end in a mark are cut (FineWeb runs C4 without this rule)
    c.prepare.perplexity_model = ""  # perplexity: a saved n-gram model (llmjax classify --kind ngram)
    c.prepare.perplexity_max = 0.0  # perplexity: more bits per byte are rejected; 0: only noted
    c.prepare.quality_model = ""  # quality: a saved classifier (llmjax classify)
    c.prepare.quality_min = 0.5  # quality: a lower probability is rejected
    c.prepare.toxicity_model = ""  # toxicity: a saved classifier beside the word lists; empty: the lists alone
    c.prepare.toxicity_max = 0.5  # toxicity: a higher probability is rejected
    c.prepare.toxic_words_max = 0.02  # toxicity: a larger share of listed words is rejected
    c.prepare.personal = ("email", "phone", "ip", "card", "iban", "key")  # personal: what is masked
    c.prepare.near_jaccard = 0.7  # near: documents with this share of common shingles are duplicates
    c.prepare.near_bands = 14  # near: bands of the MinHash
    c.prepare.near_rows = 8  # near: hash functions in a band; 14 x 8 finds 0.988 of pairs at 0.85, 0.77 at 0.75
    c.prepare.near_words = 5  # near: words in a shingle
    c.prepare.near_keep = "first"  # near: which duplicate stays: the first (in the order of the sources) or the longest
    c.prepare.substring_tokens = 50  # substring: repeated passages of at least so many words and marks are cut out
    c.prepare.decontaminate = ()  # decontaminate: files of benchmarks, in lm-evaluation-harness's JSONL
    c.prepare.decontaminate_words = 13  # decontaminate: so many words in a row mean that an item is in a document
    c.prepare.decontaminate_characters = 50  # decontaminate: and so many common characters
    c.prepare.caps = ()  # caps: most bytes of a language or a source, such as ("language:de=2GB", "source:web=10GB")
    c.prepare.earlier = ()  # folders of earlier runs, whose documents and passages count as seen (exact, near, lines, paragraphs, substring)
    c.prepare.route = "source"  # shards are named SOURCE (source) or SOURCE.LANGUAGE (language), for data.mixture
    c.prepare.bias = False  # report which identity terms stand near words of sentiment, before and after (English)
    c.prepare.engine = "local"  # local (processes of this machine) or spark (a cluster; pip install llmjax[spark])
    c.prepare.spark_master = "local[*]"  # spark: where the cluster is, such as spark://HOST:7077
    c.prepare.workers = 0  # local: processes; 0: one for each core
    c.prepare.memory_bytes = 4_000_000_000  # local: half of it is for groupings, which spill to disk beyond that
    c.prepare.keep_work = False  # keep WORKDIR/prepare/work, with the decisions of every step


def _tokenizer(c: ConfigDict) -> None:
    c.tokenizer = ConfigDict()
    c.tokenizer.kind = "bpe"  # bpe, unigram, char (SentencePiece) or byte
    c.tokenizer.vocab_size = 4096  # pieces, the 256 bytes and 4 special tokens included; char and byte derive theirs
    c.tokenizer.path = ""  # use this tokenizer instead: a SentencePiece .model, a tokenizer.json, or a folder; "": train one, or take train.init_from's
    c.tokenizer.train_bytes = 20_000_000  # train on at most this much text, taken evenly over the documents
    c.tokenizer.split_digits = True  # every digit is its own piece
    c.tokenizer.add_tokens = ()  # continued pretraining: texts that become tokens, behind those of the tokenizer that is taken over
    c.tokenizer.add_learnt = 0  # continued pretraining: so many tokens are learnt from the domain's text and added


def _model(c: ConfigDict) -> None:
    c.model = ConfigDict()
    # size
    c.model.layers = 4  # N, the number of blocks
    c.model.width = 256  # D, the size of the residual stream
    c.model.heads = 4  # H, query heads
    c.model.kv_heads = 0  # G, a divisor of heads; 0: the same as heads (multi-head), 1: multi-query
    c.model.head_size = 0  # K; 0: width / heads
    c.model.mlp_width = 0  # F; 0: 4 x width, or 8/3 x width rounded up to 64 for gated activations
    c.model.encoder_layers = 0  # blocks of a bidirectional encoder (encoder-decoder); 0: none
    c.model.embedding_width = 0  # size of the token embeddings, projected to and from the width; 0: the width
    # blocks
    c.model.pattern = ("global",)  # the mixer of each layer, repeated: global, local, nope (attention; nope: no rotary positions), rnn, lstm, rglru, mamba2, conv
    c.model.window = 1024  # tokens that local attention sees, its own included
    c.model.block = "serial"  # serial: attention, then MLP; parallel: both read the same input and are added
    c.model.shared_norm = True  # parallel blocks: one norm for both branches (Falcon-7B, PaLM), or one each (Falcon-40B)
    c.model.mlp = "dense"  # dense (or experts, see model.moe), or none
    c.model.activation = "swiglu"  # gelu (exact), gelu_tanh, relu, relu2, silu; gated: swiglu, geglu, geglu_tanh, reglu, swiglu_clamped (gpt-oss)
    c.model.bias = ()  # the parts that have biases: qkv, out, mlp, norm, head, router
    c.model.norm = "rms"  # rms, layer, batch or none
    c.model.norm_place = "pre"  # pre, post (after the sum), sandwich (before and after each branch) or after (each branch, OLMo 2)
    c.model.norm_epsilon = 1e-5  # added to the variance in every norm
    c.model.norm_zero_centered = False  # the scale is 1 + its parameter (Gemma)
    c.model.residual_scale = 1.0  # multiplies the residual stream before a branch is added; 0: no residual path; 1 becomes alpha with init=deepnorm
    c.model.branch_scale = 1.0  # times each branch before it is added to the residual stream (Granite)
    c.model.embedding_norm = False  # a norm after the embeddings
    c.model.final_norm = True  # a norm after the last block
    # attention
    c.model.direction = "causal"  # what a token sees when the objective does not say: causal or bidirectional
    c.model.qk_norm = False  # RMS-normalise queries and keys per head before the rotation
    c.model.qk_norm_over = "head"  # what that norm is over: each head, or all heads of a token together (heads, OLMo 2)
    c.model.attention_scale = 0.0  # multiplies the scores; 0: 1/sqrt(K)
    c.model.attention_soft_cap = 0.0  # scores = cap * tanh(scores / cap); 0: off
    c.model.attention_sinks = False  # each head has a learnt score of one more key, whose value is zero (gpt-oss)
    c.model.two_stream = False  # add a stream of queries that do not see their own token (XLNet), for objective permutation
    c.model.latent = ConfigDict()
    c.model.latent.kv_rank = 0  # size of the vector that keys and values are made of (multi-head latent attention, DeepSeek-V2); 0: they are made of the input
    c.model.latent.query_rank = 0  # the same for queries; 0: they are made of the input
    c.model.latent.rotary_size = 64  # dimensions of each head that are rotated, which all heads' keys share
    c.model.latent.value_size = 128  # dimensions of a head's values, at most the head size
    # positions
    c.model.position = "rotary"  # rotary, learned, sinusoidal, alibi, t5, xlnet (both relative) or none
    c.model.max_length = 1024  # rows of the learned position table, and the default size of the decoding cache; longrope chooses its factors by it
    c.model.position_offset = 0  # rows of the learned position table before position 0 (2 in OPT and RoBERTa)
    c.model.rotary_base = 10_000.0  # the longest wavelength is 2 pi times this, in tokens
    c.model.rotary_fraction = 1.0  # share of each head that is rotated
    c.model.rotary_local_base = 0.0  # another base, without scaling, in layers with local attention; 0: the same
    c.model.rotary_scaling = "none"  # stretch rotary positions to longer texts: none, linear, ntk, yarn, llama3, longrope
    c.model.rotary_factor = 1.0  # by how much
    c.model.rotary_original_length = 0  # yarn, llama3, longrope: the length of the first training
    c.model.rotary_short_factors = ()  # longrope: what the frequency of each pair is divided by, where max_length is at most that length
    c.model.rotary_long_factors = ()  # longrope: and where it is longer
    c.model.rotary_slow = 1.0  # yarn, llama3: frequencies with fewer turns over that length are divided by the factor
    c.model.rotary_fast = 32.0  # yarn, llama3: frequencies with more turns are left alone (32 in YaRN, 4 in Llama 3)
    c.model.rotary_truncate = True  # yarn: the ramp between both begins and ends at a whole pair of dimensions
    c.model.rotary_attention_factor = 0.0  # yarn, longrope: times cosines and sines; 0: 0.1 ln(rotary_factor) + 1, or sqrt(1 + ln(rotary_factor) / ln(rotary_original_length)), as in the papers
    c.model.alibi_scale = 1.0  # times ALiBi's slopes
    c.model.alibi_rounded = False  # round slopes, positions and their products to bfloat16 (Falcon-RW)
    c.model.relative_buckets = 32  # t5: number of distances that are told apart
    c.model.relative_max_distance = 128  # t5: longer distances share the last bucket
    # inputs and outputs
    c.model.tie_embeddings = True  # the output head is the transposed embedding
    c.model.embedding_scale = 1.0  # times the token embeddings (sqrt(width) in Gemma and the original Transformer)
    c.model.logit_scale = 1.0  # times the logits (1/sqrt(width) in PaLM and T5)
    c.model.logit_soft_cap = 0.0  # logits = cap * tanh(logits / cap); 0: off
    c.model.types = 0  # kinds of segments with an embedding each (2 in BERT); 0: none
    c.model.languages = 0  # languages with an embedding each (XLM); 0: none
    c.model.head_transform = False  # a dense layer, the activation and a norm before the output head (BERT)
    c.model.pooler = False  # a dense layer with tanh on the first token (BERT)
    c.model.value_head = False  # a number a token, from the last hidden state: what reward models and critics say
    c.model.classes = 0  # classes of a linear classifier on the first token, after the pooler; 0: none. objective classify sets it by its rows (1: a number)
    c.model.ahead = 1  # tokens predicted from each position (multi-token prediction); each after the first has its own block
    c.model.vocab_size = 0  # V; 0: the tokenizer's, rounded up to vocab_multiple
    c.model.vocab_multiple = 64  # the embedding's rows are rounded up to a multiple, so that tensor axes divide it
    # dropout
    c.model.dropout = 0.0  # on the output of each block's branches
    c.model.embedding_dropout = 0.0  # on the sum of the embeddings
    c.model.attention_dropout = 0.0  # on the attention weights
    c.model.layer_drop = 0.0  # share of the blocks skipped in a step
    c.model.dropout_shape = "constant"  # over the layers: constant, or linear from 0 to the rate (LIMA)
    # initialisation
    c.model.init = "gpt2"  # the table in model/init.py: gpt2, xavier, lecun, t5, t_fixup, mup, completep, orthogonal, deepnorm
    c.model.init_std = 0.02  # standard deviation of the gpt2, mup and completep initialisers
    c.model.mup_base_width = 256  # mup, completep: the width at which learning rates were chosen (model/parametrization.py)
    c.model.mup_base_layers = 4  # completep: the layers at which they were chosen
    c.model.mup_depth_power = 1.0  # completep: branches are divided by this power of layers / base layers; 0.5: depth-muP
    # numbers and speed
    c.model.dtype = "float32"  # compute in float32 or bfloat16
    c.model.param_dtype = "float32"  # parameters are stored in float32, or bfloat16 with stochastic rounding; optimizer state is float32 always
    c.model.quantization = "none"  # matrix products of the blocks, but not of experts, in none, int8 or fp8 (pip install llmjax[quantized])
    c.model.remat = "none"  # rematerialise per layer: none, full, selective (keep the matrix products), or MaxText's policies by name, such as save_qkv_proj: model/block.py, REMAT_POLICIES
    c.model.barriers = False  # XLA fuses no other work into matrix products: faster plans of large models on TPU (docs/plan.md)
    c.model.scan_unroll = 1  # layers per iteration of the scan; model.layers or more: fully unrolled (faster steps, slower compile)
    c.model.attention = "auto"  # reference, dot_product (jax.nn), blocked (CPU), splash (TPU), cudnn (GPU), or auto: chosen once and printed

    c.model.adapter = ConfigDict()
    c.model.adapter.kind = "none"  # small matrices beside frozen linear maps, which alone are trained (with new heads, and what optimizer.train adds): none, lora or dora
    c.model.adapter.rank = 16  # numbers between the two matrices
    c.model.adapter.alpha = 32.0  # their product is times alpha / rank
    c.model.adapter.scale = "rank"  # or times alpha / sqrt(rank): root (rsLoRA, for large ranks)
    c.model.adapter.targets = ("(first|layers|last)/",)  # regular expressions: linear maps whose path one of them matches; "head" needs model.tie_embeddings=False
    c.model.adapter.dropout = 0.0  # on their inputs in the layers; off where a policy is compared with itself or a reference
    c.model.adapter.base_format = "stored"  # of the frozen kernels in the layers: stored, or in blocks of int8 or nf4 (QLoRA)

    c.model.moe = ConfigDict()
    c.model.moe.experts = 0  # E, routed experts in a sparse layer; 0: all layers are dense
    c.model.moe.active = 2  # experts that see each token
    c.model.moe.shared = 0  # experts that see every token (DeepSeek)
    c.model.moe.shared_gate = False  # their output times the sigmoid of a number that is linear in the input (Qwen 2)
    c.model.moe.width = 0  # F of one expert; 0: as the dense MLP's
    c.model.moe.first = 0  # dense layers at the start
    c.model.moe.every = 1  # after those, every so-many-th layer is sparse
    c.model.moe.dense = ()  # and of these the layers of these numbers, from 0, are dense all the same
    c.model.moe.score = "softmax"  # from the router's logits to scores: softmax or sigmoid
    c.model.moe.groups = 1  # equal groups of the experts, of which a token first chooses some (DeepSeek)
    c.model.moe.active_groups = 1  # groups that each token chooses
    c.model.moe.group_score = 1  # a group is as good as the sum of its so many best experts (1 in DeepSeek-V2, 2 in V3)
    c.model.moe.normalize = True  # the scores of the chosen experts are divided by their sum
    c.model.moe.scale = 1.0  # times the routed experts' output
    c.model.moe.dispatch = "dropless"  # dropless (sorted by expert), or capacity (each expert takes so many tokens, the rest is dropped)
    c.model.moe.capacity_factor = 1.25  # capacity: tokens an expert takes, relative to moe.active x tokens / experts
    c.model.moe.balance_loss = 0.01  # weight of the load-balancing loss (Switch Transformer)
    c.model.moe.balance_over = "batch"  # the balance loss is over a micro-batch (batch), each row (row, DeepSeek) or all layers together (layers, Mixtral)
    c.model.moe.z_loss = 0.001  # weight of the router's z-loss (ST-MoE)
    c.model.moe.bias_rate = 0.0  # step of the bias that balances the experts without a loss (DeepSeek-V3); 0: no bias
    c.model.moe.jitter = 0.0  # training: uniform noise in 1 +- this multiplies the router's input (Switch)

    c.model.recurrent = ConfigDict()
    c.model.recurrent.width = 0  # LSTM's hidden size, the inner width of rglru, mamba2 and conv; 0: width (mamba2: twice it)
    c.model.recurrent.heads = 0  # blocks of the RG-LRU's gates, heads of mamba2; 0: model.heads
    c.model.recurrent.state_size = 128  # mamba2: the state of each channel
    c.model.recurrent.groups = 1  # mamba2: groups of heads that share B and C
    c.model.recurrent.conv_width = 4  # rglru, mamba2, conv: tokens seen by the short convolution
    c.model.recurrent.chunk = 64  # mamba2: tokens in a chunk, inside which the scan is a matrix product


def _objective(c: ConfigDict) -> None:
    c.objective = ConfigDict()
    c.objective.name = "causal"  # of text: causal, masked, permutation, translation, unilm, span, prefix, infill, multi_token; of answers: preference, unpaired, reward, distill, policy; of labelled texts: classify
    c.objective.z_loss = 0.0  # weight of log(Z)^2 (PaLM uses 1e-4)
    c.objective.label_smoothing = 0.0  # share of the target's probability spread evenly over the vocabulary
    c.objective.vocab_size = 0  # label_smoothing: ids that share the mass; 0: those of the tokenizer and the objective, without padding rows
    c.objective.focal = 0.0  # gamma of the focal loss: nats are weighted by (1 - probability)^gamma; 0: cross entropy
    c.objective.loss_chunks = 1  # pieces of each row for which logits and loss are made in turn; 1: all at once
    c.objective.l1 = 0.0  # weight of the sum of |parameter| (matrices only)
    c.objective.l2 = 0.0  # weight of half the sum of parameter^2 (matrices only); part of the gradient, unlike weight decay
    c.objective.mask_rate = 0.15  # masked, translation, unilm, span: share of tokens that are predicted
    c.objective.mask_split = (0.8, 0.1, 0.1)  # of those: replaced by <mask>, by a random token, kept
    c.objective.whole_words = False  # masked, translation: mask all tokens of a word together
    c.objective.span_length = 3.0  # span: mean length of a span in tokens
    c.objective.predict_share = 0.1667  # permutation: share of each row, last in the order, that is predicted (1/K of XLNet, K = 6)
    c.objective.recurrence = 1  # permutation: parts of a row read in turn, each with the memory of those before
    c.objective.modes = (1.0, 0.5, 0.5, 1.0)  # unilm: weights of bidirectional, left-to-right, right-to-left, sequence-to-sequence rows
    c.objective.infill_rate = 0.5  # infill: share of documents with the middle moved to the end (FIM)
    c.objective.infill_suffix_first = 0.5  # infill: share of those in suffix-prefix-middle order

    c.objective.preference = ConfigDict()
    c.objective.preference.loss = "sigmoid"  # of pairs, or several with weights, "orpo=1 sft=1": see objectives/preference.py
    c.objective.preference.beta = 0.1  # how strongly the policy is held to its reference
    c.objective.preference.label_smoothing = 0.0  # sigmoid, aot, simpo, cpo, robust, exo: share of pairs whose label is wrong
    c.objective.preference.divergence = "reverse_kl"  # reverse_kl, forward_kl, js or alpha
    c.objective.preference.alpha = 0.5  # divergence alpha: its exponent, between reverse KL (0) and forward KL (1)
    c.objective.preference.temperature = 0.05  # discopop: of the mixture of its two losses
    c.objective.preference.margin = 0.0  # simpo: the margin to be reached
    c.objective.preference.reward_shift = 0.0  # bco: the reward between good and bad
    c.objective.preference.length_weight = 1.0  # of tokens beyond the shorter answer's length; below 1: length-desensitised

    c.objective.unpaired = ConfigDict()
    c.objective.unpaired.loss = "kto"  # of answers that are each good or bad: kto, apo_zero or bco
    c.objective.unpaired.beta = 0.1  # how strongly the policy is held to its reference
    c.objective.unpaired.good_weight = 1.0  # of good answers; KTO: good x their number near bad x theirs, within 4/3
    c.objective.unpaired.bad_weight = 1.0  # of bad ones
    c.objective.unpaired.reward_shift = 0.0  # bco: the reward between good and bad

    c.objective.classify = ConfigDict()
    c.objective.classify.target = "class"  # of texts: a class (cross entropy) or a number (squared error)
    c.objective.classify.labels = ()  # names of the classes; empty: those of the rows, in order

    c.objective.distill = ConfigDict()
    c.objective.distill.teacher = ""  # a run or an import with the same tokenizer
    c.objective.distill.divergence = "forward"  # from teacher to student: forward or reverse KL, or js (Jensen-Shannon)
    c.objective.distill.mix = 0.5  # js: the teacher's share in the mixture of both
    c.objective.distill.temperature = 1.0  # of both distributions
    c.objective.distill.top = 64  # likeliest ids of the teacher that are told apart; 0: all
    c.objective.distill.data_weight = 0.0  # share of the text's own cross entropy in the loss
    c.objective.distill.on_policy = 0.0  # share of batches whose answers the student samples (GKD)

    c.objective.reward = ConfigDict()
    c.objective.reward.centre = 0.0  # weight of the squared sum of a pair's scores, which keeps scores near 0

    c.objective.policy = ConfigDict()
    c.objective.policy.loss = "clip"  # clip (PPO, GRPO), cispo or sapo
    c.objective.policy.level = "token"  # what has a ratio: a token, or a whole sequence (GSPO)
    c.objective.policy.aggregate = "constant"  # how tokens are weighed: constant (Dr. GRPO), token, sequence or sequence_sum
    c.objective.policy.length = 0  # aggregate constant: tokens by which a text's sum is divided; 0: rollout.tokens
    c.objective.policy.clip = 0.2  # how far a ratio may be from 1
    c.objective.policy.clip_high = 0.0  # the same upwards (DAPO: 0.28); 0: as far as clip
    c.objective.policy.dual_clip = 0.0  # the largest ratio of tokens with a negative advantage; 0: none
    c.objective.policy.ratio_cap = 5.0  # cispo: the largest ratio
    c.objective.policy.gate_positive = 1.0  # sapo: steepness where the advantage is positive
    c.objective.policy.gate_negative = 1.05  # sapo: and where it is negative
    c.objective.policy.kl_weight = 0.0  # of the KL to the reference as a term of the loss
    c.objective.policy.kl_estimator = "k3"  # k2, k3 (times the ratio, so that its gradient is right) or k3_uncorrected
    c.objective.policy.entropy_weight = 0.0  # of the entropy, which is raised
    c.objective.policy.value_weight = 0.1  # of the value head's loss, where there is one
    c.objective.policy.value_clip = 0.2  # how far a value may move in an update; 0: anywhere
    c.objective.policy.correction = ""  # for another sampler than the trainer: token_truncate, sequence_truncate or token_mask
    c.objective.policy.correction_low = 0.5  # token_mask: the smallest weight
    c.objective.policy.correction_high = 2.0  # the largest weight
    c.objective.policy.never = ()  # ids that are never sampled; empty: as the tokenizer says
    c.objective.policy.temperature = 0.0  # of the distribution that is trained; 0: that of sampling, rollout.temperature


def _parallel(c: ConfigDict) -> None:
    c.parallel = ConfigDict()
    c.parallel.mesh = "data=-1"  # axes and sizes: data, pipeline, fsdp, expert, context, tensor; one -1 takes the devices that are left
    c.parallel.slices = 0  # pods joined by the data-centre network, which the first axes cross; 0: as the devices say
    c.parallel.zero = 3  # what fsdp divides: 1: optimizer state; 2: gradients too; 3: parameters too
    c.parallel.sequence = False  # divide the positions of the residual stream over tensor, where it would be whole
    c.parallel.features = False  # divide its features instead, where tensor does not divide the positions
    c.parallel.context = "gather"  # attention over positions divided by the axis context: gather keys and values, or a ring
    c.parallel.rounds = 1  # pipeline: turns of each part through the stages; 1: GPipe, more: circular schedule, less bubble
    c.parallel.parts = 0  # pipeline: parts of a micro-batch that follow each other through the stages; 0: 4 a stage, as rows allow
    c.parallel.rules = ()  # rows (regex, (axis, ...)) before the placement table in parallel/placement.py
    c.parallel.compiler = ()  # options of XLA's compiler: sets by name (overlap, gathers, data_parallel, vmem, ...), each with a row for every chip in parallel/compiler_options.py, and xla_NAME=VALUE
    c.parallel.cpu_devices = 0  # CPU devices to make without an accelerator; 0: as many of the cores as divide the batch
    c.parallel.heartbeat_seconds = 10  # several processes: one that is silent for so long is lost, and the others end
    c.parallel.start_seconds = 1800  # several processes: time for all to find each other; a large gang starts slowly after a preemption


def _optimizer(c: ConfigDict) -> None:
    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # adamw, muon (matrices; AdamW for the rest), adafactor, lion, sgd
    c.optimizer.learning_rate = 1e-3  # peak; adafactor: relative to each matrix's root mean square
    c.optimizer.muon_learning_rate = 0.02  # peak for the matrices that Muon updates
    c.optimizer.beta1 = 0.9  # AdamW and Lion; momentum for SGD
    c.optimizer.beta2 = 0.95  # AdamW and Lion
    c.optimizer.epsilon = 1e-8  # AdamW
    c.optimizer.muon_momentum = 0.95  # Muon
    c.optimizer.weight_decay = 0.1  # decoupled, times the learning rate, matrices only (train/optimizer.py)
    c.optimizer.clip_norm = 1.0  # global gradient norm; 0: off
    c.optimizer.train = ""  # regular expression: only parameters whose path it matches are trained (with adapters: these too); "": all
    c.optimizer.freeze = ""  # regular expression: parameters whose path it matches are not trained; "": none
    c.optimizer.layer_decay = 1.0  # the rate of each layer relative to the one after it; embeddings are before the first, heads after the last
    c.optimizer.rates = ()  # times the rate of parameters whose path matches: ("value/=10", "embedding=0.1"); the first that matches counts


def _schedule(c: ConfigDict) -> None:
    c.schedule = ConfigDict()
    c.schedule.by = "steps"  # the rate is a function of steps or tokens; they differ during a batch ramp
    c.schedule.name = "cosine"  # constant, step, exponential, cosine, linear, inverse_sqrt, wsd (warm-up, stable, decay)
    c.schedule.warmup = "2%"  # a duration, linear from 0
    c.schedule.decay = "20%"  # wsd: the duration of the decay at the end, linear
    c.schedule.final = 0.1  # the last learning rate as a share of the peak: cosine, linear, exponential, wsd
    c.schedule.drop_at = ("60%", "85%")  # step: the durations after which the rate drops
    c.schedule.drop_factor = 0.1  # step: multiplies the rate at each drop


def _train(c: ConfigDict) -> None:
    c.train = ConfigDict()
    c.train.duration = "1000 steps"  # 1000, "1000 steps", "50M tokens", "2 epochs", or "5 minutes" of training, measured once and then fixed in steps
    c.train.batch_size = 16  # sequences a step, over all devices and micro-batches
    c.train.batch_ramp = "0 steps"  # the duration over which batches grow to that size, doubling; "0 steps": off
    c.train.batch_start = 1  # sequences in the first batches of the ramp
    c.train.sequence_length = 256  # L, tokens
    c.train.micro_batches = 1  # gradient accumulation: the batch is cut into this many parts, computed in turn
    c.train.ema = 0.0  # decay of the moving average of the weights, which evaluation uses; 0: off
    c.train.max_bad_steps = 10  # end the run after so many updates in a row that were skipped for non-finite gradients
    c.train.hunt_nan = False  # run a step that is not finite again, and name the first layer that is bad; slows every step
    c.train.noise_scale = False  # log the gradient noise scale, the batch beyond which rows help little; from train.micro_batches of at least 2
    c.train.device_price = 0.0  # US dollars for an hour of one device, for the loss by dollar; 0: the list price of its chip, where it is known
    c.train.eval_every = "10%"  # held-out loss during training; "0 steps": off
    c.train.eval_first = False  # measure also before the first step
    c.train.eval_batches = 8  # batches of held-out text for that
    c.train.log_every = 10.0  # seconds between progress lines where there is no terminal
    c.train.tensorboard = False  # also write TensorBoard event files (pip install llmjax[tensorboard])
    c.train.inherit_model = False  # take the settings under model from train.init_from, except those that are given here
    c.train.init_from = ""  # start from the weights of this run or checkpoint, with its tokenizer, a new optimizer and step 0
    c.train.executable = ""  # a file of `llmjax plan --save-executable`: compiled steps, so that the first one starts in seconds

    c.train.rewind = ConfigDict()
    c.train.rewind.factor = 0.0  # a loss above this times its running median is high; while it stays so, go back and skip batches (PaLM); 0: never
    c.train.rewind.window = 100  # losses in the running median
    c.train.rewind.patience = 10  # so many high losses in a row are a spike
    c.train.rewind.steps = 100  # go back to a checkpoint from at least so many steps before the spike, if there is one (checkpoint.keep)
    c.train.rewind.skip = 100  # batches skipped beyond the one where the spike was noticed
    c.train.rewind.limit = 3  # times to go back before the run ends with an error


def _checkpoint(c: ConfigDict) -> None:
    c.checkpoint = ConfigDict()
    c.checkpoint.every = "25%"  # a duration: the most steps that are lost when machines die
    c.checkpoint.every_seconds = 600.0  # save also after this much time; 0: off
    c.checkpoint.keep = 2  # newest checkpoints kept
    c.checkpoint.keep_every = "0 steps"  # keep those at multiples of this duration for ever; "0 steps": none


def _eval(c: ConfigDict) -> None:
    c.eval = ConfigDict()
    c.eval.sequence_length = 0  # 0: as in training
    c.eval.stride = 0  # tokens scored by each window, the rest being context; 0: half a window
    c.eval.batch_size = 32  # windows at a time
    c.eval.max_bytes = 0  # score at most this much text of each source; 0: all of it
    c.eval.xz = True  # compress the same bytes with xz -9e, as a yardstick
    c.eval.tasks = ()  # benchmarks, such as ("arc_challenge", "mmlu"), openllm_v1_4, or any task of lm-evaluation-harness
    c.eval.data = ()  # folders with their questions (arc_challenge_test.jsonl, ...); nothing is downloaded
    c.eval.runner = "auto"  # auto (our own where it knows the task, with the same scores), or harness for all tasks
    c.eval.limit = 0  # questions of each task, and held-out rows of eval.texts, at most; 0: all
    c.eval.chat = False  # tasks use the chat template (by the harness)
    c.eval.context_length = 0  # tokens of context for tasks; 0: model.max_length
    c.eval.texts = ()  # sft, during training: how near texts written for held-out rows are to their answers: exact_match, bleu, chrf, rouge1, rouge2, rougeL
    c.eval.samples = 1  # humaneval, mbpp: programs for each problem
    c.eval.pass_at = (1,)  # k of pass@k, each at most eval.samples
    c.eval.temperature = 0.0  # humaneval, mbpp: of sampling; 0: greedy
    c.eval.prompts = ()  # files of prompts that the answers stage answers, and scores by rollout.rewards; see post/answers.py
    c.eval.baseline = ""  # a function "module:name" of the rows of eval.prompts, whose answers are scored beside the model's; "": none
    c.eval.judge = ""  # mt_bench: who rates answers: the folder of a chat model's run, module:function, or a .jsonl of what a judge said
    c.eval.judge_against = ""  # mt_bench: a .jsonl of other answers to compare with (question_id, turns); "": none
    c.eval.contamination = True  # look for the tasks' questions in the run's training text


def _rollout(c: ConfigDict) -> None:
    c.rollout = ConfigDict()
    c.rollout.rewards = ()  # policy: what scores answers: "module:function=weight", "model:RUN=weight"; see post/rewards.py
    c.rollout.tools = ()  # functions that the model may call while it answers, "module:function"; see post/tools.py
    c.rollout.turns = 4  # with tools: the most turns of the model in an answer
    c.rollout.samples = 8  # answers to each prompt
    c.rollout.updates = 1  # batches that a round of answers is cut into
    c.rollout.pack = 1  # answers that share a row of the trainer, at most, if they fit into train.sequence_length; micro-batches that stay empty are left out
    c.rollout.tokens = 128  # of the longest answer
    c.rollout.temperature = 1.0  # answers are sampled at this temperature, and trained at it
    c.rollout.advantage = "mean"  # what an answer is compared with: mean of its group, leave_one_out, none, or gae (a value head)
    c.rollout.scale = "none"  # advantages are divided by the deviation of their group or the batch: none, group, batch
    c.rollout.resample = 0  # further draws of prompts in place of groups whose answers all earn the same
    c.rollout.mask_cut = False  # answers that were cut at rollout.tokens are not learnt from
    c.rollout.overlong_buffer = 0  # the last tokens of the longest answer, over which a penalty grows to 1; 0: none
    c.rollout.kl_weight = 0.0  # of the KL to the reference, taken from the reward
    c.rollout.kl_target = 0.0  # nats an answer that the weight is adapted to; 0: it stays
    c.rollout.kl_horizon = 10_000  # answers over which the weight adapts
    c.rollout.discount = 1.0  # gae: gamma
    c.rollout.trace = 0.95  # gae: lambda
    c.rollout.slots = 16  # answers that are sampled at a time


def _generate(c: ConfigDict) -> None:
    c.generate = ConfigDict()
    c.generate.prompts = ("def ",)  # continued by the generate stage, and by `llmjax generate` without prompts of its own
    c.generate.max_new_tokens = 128  # tokens written for each prompt
    c.generate.temperature = 0.8  # 0: greedy
    c.generate.top_k = 0  # keep the k most likely tokens; 0: all
    c.generate.top_p = 0.95  # keep the smallest set of tokens with this much probability; 1: all
    c.generate.min_p = 0.0  # keep tokens at least this likely relative to the likeliest; 0: all
    c.generate.typical_p = 1.0  # keep the tokens nearest to the expected surprise with this much probability; 1: all
    c.generate.repetition_penalty = 1.0  # divides (or multiplies, below 0) the logits of tokens in prompt and text; 1: off
    c.generate.frequency_penalty = 0.0  # subtracted from a token's logit for each time it is in the text
    c.generate.presence_penalty = 0.0  # subtracted from the logits of tokens in the text
    c.generate.beams = 1  # more: beam search with so many candidates instead of sampling; chat ignores it
    c.generate.length_penalty = 1.0  # beams compare log-probability / tokens ** this; 0: no penalty, larger: longer texts
    c.generate.stop = ()  # strings that end a text and are not part of it
    c.generate.json_schema = ""  # texts are JSON of this schema; "": free texts
    c.generate.regex = ""  # texts match this regular expression from end to end; "": free texts
    c.generate.grammar = ""  # texts are sentences of this grammar, in Lark's notation; "": free texts


def _infer(c: ConfigDict) -> None:
    c.infer = ConfigDict()
    c.infer.slots = 8  # texts decoded at a time by `llmjax generate --prompts`
    c.infer.length = 0  # tokens of prompt and text that a slot holds; 0: as the prompts need, up to model.max_length
    c.infer.steps = 8  # tokens a text at most between two looks at arrivals and stop strings
    c.infer.weights = "auto"  # form of the weights: auto, stored, tiles (CPU, few texts), int8 (rounded, a quarter of the memory)
    c.infer.ahead = 0  # tokens guessed a step from earlier occurrences of the same words, and checked at once; 0: off
    c.infer.mesh = ""  # how eval, generate, chat and bench-infer divide the model, e.g. "tensor=4 data=-1"; "": by memory
    c.infer.cache = "auto"  # folder of compiled programs and mapped weights; auto: LLMJAX_CACHE or the user's cache folder; off: keep nothing
    c.infer.cache_bytes = 5_000_000_000  # its limit; what was not used for the longest time goes first


def _serve(c: ConfigDict) -> None:
    c.serve = ConfigDict()
    c.serve.host = "127.0.0.1"  # address that `llmjax serve` listens on; others than this machine's need API keys
    c.serve.hosts = ()  # names, beside this machine's, by which the server may be asked
    c.serve.origins = ()  # sites whose pages may ask the server, such as "https://example.org"; "*": all
    c.serve.queue = 0  # texts that wait beside those in slots; others are refused with 429. 0: four times infer.slots
    c.serve.per_key = 0  # texts that a key may have written at a time; 0: no limit
    c.serve.choices = 8  # the most samples of a prompt (n)
    c.serve.first_seconds = 0.0  # the longest wait for the first token; 0: no limit
    c.serve.seconds = 600.0  # the longest time for an answer; 0: no limit
    c.serve.drain_seconds = 30.0  # answers may go on so long when the server ends
    c.serve.stall_seconds = 120.0  # a step of the engine that takes longer ends the server with an error


# fmt: on
# In the order in which they are listed.
GROUPS: tuple[Callable[[ConfigDict], None], ...] = (
    _data,
    _prepare,
    _tokenizer,
    _model,
    _objective,
    _parallel,
    _optimizer,
    _schedule,
    _train,
    _checkpoint,
    _eval,
    _rollout,
    _generate,
    _infer,
    _serve,
)


def base() -> ConfigDict:
    """All settings with their defaults."""
    c = ConfigDict()
    c.name = "run"  # the run's name; its folder is runs/NAME unless --workdir says otherwise
    c.seed = 0  # the one seed: initialisation, data order, dropout and sampling follow from it
    c.stages = ("prepare", "tokenizer", "train", "eval", "generate", "report")  # what `llmjax run` does, in this order
    for add in GROUPS:
        add(c)
    return c


def comments() -> dict[str, str]:
    """Dotted key -> the comment that follows it here, in the order of `base()`."""
    source = Path(__file__).read_text(encoding="utf-8")
    found = dict(re.findall(r"^    c\.([a-z0-9_.]+) = .*?  # (.*)$", source, re.MULTILINE))
    own = [key for key in found if "." not in key]
    return {key: found[key] for key in (*own, *(key for key in found if "." in key))}
