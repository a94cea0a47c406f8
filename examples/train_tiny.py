"""Train the model that Shoal ships in `deploy/models/tiny`, from the standard library's own source.

    python examples/train_tiny.py --output /tmp/tiny --compile       # minutes on a GPU
    python examples/train_tiny.py --output /tmp/tiny --device cpu    # the same, very slowly
    python examples/train_tiny.py --evaluate deploy/models/tiny      # perplexity on the held-out modules

The data are the `.py` files of the running interpreter's standard library (`--stdlib` names another one). A hash of
its path puts a module into the held-out part (5 %), the validation part (2.5 %) or the training part. So a module
is held out in every Python version. The library's tests are training data only: they are two thirds of the text, and
without them held-out perplexity is 15.1 a token instead of 8.7. The validation part chooses checkpoints; the held-out
part chooses nothing.

The result is a Hugging Face folder: a Llama of 7.3 million parameters in bfloat16 safetensors, a byte-level BPE
tokenizer of 4096 tokens with a chat template, and `heldout.json` with the measurements.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import random
import re
import sysconfig
import tempfile
import textwrap
import time
import tokenize
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

VOCAB_SIZE = 4096
CONTEXT = 2048
# The ids 0 to 4, in this order.
BOS, EOS, PAD, TURN_START, TURN_END = SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Indentation is a separate piece: a line's first word is the same token at every depth, and a prompt may end after a
# newline or an indent. An identifier is one piece, digits go in threes, and punctuation takes the newlines after it
# (`):\n`).
PIECES = r"(?<=\n)[ \t]+| ?[^\W\d]\w*| ?\d{1,3}| ?[^\s\w]+\n*|\n+|\s+(?!\S)|\s+"

# Codec tables and generated text are not the code that the model should learn to write.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "encodings", "pydoc_data"}
TEST_FOLDERS = {"test", "tests", "idle_test"}
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata_")

CHAT_SHARE = 0.3  # of the functions, in each epoch
BPE_DROPOUT = 0.1  # of the merges, in half of the documents


@dataclass(frozen=True)
class Module:
    """One source file: its path below the library's folder, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def is_test(self) -> bool:
        return bool(TEST_FOLDERS & set(self.path.split("/")))

    @property
    def part(self) -> str:
        """`heldout`, `validation` or `training` (tests always); depends on the path alone."""
        if self.is_test:
            return "training"
        bucket = int.from_bytes(hashlib.sha256(self.path.encode()).digest()[:4], "big") % 40
        return "heldout" if bucket < 2 else "validation" if bucket == 2 else "training"


@dataclass(frozen=True)
class Measurement:
    """Negative log-likelihood of some modules: of every token and the end token, given what stands before it."""

    num_bytes: int
    num_tokens: int
    loss_per_token: float  # nats

    @property
    def perplexity_per_token(self) -> float:
        return math.exp(self.loss_per_token)

    @property
    def perplexity_per_byte(self) -> float:
        return math.exp(self.loss_per_token * self.num_tokens / self.num_bytes)

    def __str__(self) -> str:
        return (
            f"loss {self.loss_per_token:.4f} nats a token, perplexity {self.perplexity_per_token:.2f} a token, "
            f"{self.perplexity_per_byte:.3f} a byte ({self.num_tokens} tokens, {self.num_bytes} bytes)"
        )


def read_modules(stdlib: Path, tests: bool = False) -> list[Module]:
    """The library's modules but for tables (and, unless `tests`, its tests), in the order of their paths."""
    excluded = EXCLUDED_FOLDERS if tests else EXCLUDED_FOLDERS | TEST_FOLDERS
    modules = []
    for file in sorted(stdlib.rglob("*.py")):
        relative = file.relative_to(stdlib)
        if excluded & set(relative.parts) or any(p.startswith(EXCLUDED_PREFIXES) for p in relative.parts):
            continue
        try:
            with tokenize.open(file) as source:
                text = source.read()
            ast.parse(text)
        except (SyntaxError, ValueError):
            continue  # a test's sample of what is not Python
        if text.strip():
            modules.append(Module(relative.as_posix(), text))
    if not any(module.part == "heldout" for module in modules):
        raise SystemExit(
            f"{stdlib} holds {len(modules)} usable modules and none to hold out; give --stdlib another folder"
        )
    return modules


def chat_text(user: str, answer: str, system: str | None = None) -> str:
    """One exchange as `CHAT_TEMPLATE` writes it, followed by the end of the document."""
    turns = [("system", system)] * (system is not None) + [("user", user), ("assistant", answer)]
    return BOS + "".join(f"{TURN_START}{role}\n{content}{TURN_END}\n" for role, content in turns) + EOS


@dataclass(frozen=True)
class Function:
    """A function of the library, brought to the left margin: what chat examples are made from."""

    name: str
    signature: str  # `def name(args):`
    summary: str  # the docstring's first line, or ""
    source: str

    def chat(self, rng: random.Random) -> str:
        """A question whose answer is this function, asked in one of a few ways."""
        questions = [
            self.signature,
            f"Complete this function:\n\n{self.signature}",
            f"Write a Python function named {self.name}. {self.summary}".rstrip(),
        ]
        if self.summary:
            questions.append(f'{self.signature}\n    """{self.summary}"""')
            questions.append(f"Write Python code: {self.summary}")
        system = rng.choice([None, None, "You are a helpful assistant.", "You write Python code."])
        return chat_text(rng.choice(questions), self.source, system)


def read_functions(modules: list[Module]) -> list[Function]:
    """Functions and methods of 3 to 60 lines, outside of tests: the whole answer fits a window."""
    functions = []
    for module in modules:
        if module.is_test:
            continue
        lines = module.text.splitlines()
        for node in ast.walk(ast.parse(module.text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            signature_end = node.body[0].lineno - 1
            if not (3 <= last - first <= 60 and signature_end > first):
                continue
            summary = (ast.get_docstring(node) or "").split("\n", 1)[0].strip()
            signature = textwrap.dedent("\n".join(lines[first:signature_end])).rstrip()
            source = textwrap.dedent("\n".join(lines[first:last])).rstrip()
            functions.append(Function(node.name, signature, summary, source))
    return functions


def epoch_texts(modules: list[Module], functions: list[Function], rng: random.Random) -> list[str]:
    """An epoch's documents, each between its begin and end tokens, in random order.

    Half of the modules come whole, half as their top-level definitions. So the begin token may be followed by a
    `def` or by a file's first lines, and the end token may follow a finished definition.
    """
    texts = []
    for module in modules:
        whole = rng.random() < 0.5
        pieces = [module.text] if whole else re.split(r"\n{2,}(?=@|def |class |async def )", module.text)
        texts.extend(BOS + piece.rstrip() + "\n" + EOS for piece in pieces)
    texts.extend(function.chat(rng) for function in functions if rng.random() < CHAT_SHARE)
    rng.shuffle(texts)
    return texts


def epoch_windows(texts: list[str], tokenizer: Tokenizer, context: int, rng: random.Random) -> torch.Tensor:
    """The documents packed into int64 windows [num_windows, context + 1], cut at a place that differs by epoch.

    Half of the documents are encoded with BPE dropout: the data are few and seen often, so a word should not
    always be the same tokens; it also teaches the model to go on from a prompt that ends inside a token.
    """
    half = len(texts) // 2
    encodings = tokenizer.encode_batch_fast(texts[:half], add_special_tokens=False)
    tokenizer.model.dropout = BPE_DROPOUT
    encodings += tokenizer.encode_batch_fast(texts[half:], add_special_tokens=False)
    tokenizer.model.dropout = None
    rng.shuffle(encodings)
    stream = np.concatenate([np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings])
    stream = stream[rng.randrange(context) :]
    starts = list(range(0, len(stream) - context, context))
    rng.shuffle(starts)
    return torch.from_numpy(np.stack([stream[start : start + context + 1] for start in starts]))


def batches(
    modules: list[Module], tokenizer: Tokenizer, batch_size: int, context: int, seed: int
) -> Generator[torch.Tensor, None, None]:
    """Endless batches [batch_size, context + 1]; the next epoch is encoded while this one is trained on."""
    functions = read_functions(modules)
    rng = random.Random(seed)
    own = Tokenizer.from_str(tokenizer.to_str())  # its dropout is switched on and off in another thread

    def next_epoch() -> torch.Tensor:
        return epoch_windows(epoch_texts(modules, functions, rng), own, context, rng)

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next_epoch)
        while True:
            windows = coming.result()
            coming = pool.submit(next_epoch)
            yield from (part for part in windows.split(batch_size) if len(part) == batch_size)


def train_tokenizer(texts: list[str]) -> FastTokenizer:
    """A byte-level BPE of `VOCAB_SIZE` tokens: every text encodes, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = FastTokenizer(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[TURN_START, TURN_END],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model() -> LlamaForCausalLM:
    """The untrained model, float32: 8 layers, hidden 256, 8 heads over 4 KV heads, tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=SPECIALS.index(BOS),
        eos_token_id=SPECIALS.index(EOS),
        pad_token_id=SPECIALS.index(PAD),
    )
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, tokenizer: FastTokenizer, record: dict, output: Path) -> None:
    """Writes the folder's files, each whole or not at all; other files there (the model card) stay."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".saving-") as partial:
        model.generation_config = GenerationConfig(
            bos_token_id=model.config.bos_token_id,
            eos_token_id=[SPECIALS.index(EOS), SPECIALS.index(TURN_END)],
            pad_token_id=model.config.pad_token_id,
        )
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial, save_jinja_files=False)
        Path(partial, "heldout.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for file in Path(partial).iterdir():
            file.chmod(0o644)
            file.replace(output / file.name)


@torch.inference_mode()
def measure(model: LlamaForCausalLM, tokenizer: FastTokenizer, modules: list[Module], context: int) -> Measurement:
    """Scores each module alone, from its begin to its end token, in windows of `context` that share no prediction."""
    total, num_tokens = 0.0, 0
    for module in modules:
        ids = torch.tensor(tokenizer.encode(module.text + EOS, verbose=False), device=model.device)
        for start in range(0, len(ids) - 1, context):
            window = ids[start : start + context + 1]
            logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
        num_tokens += len(ids) - 1
    num_bytes = sum(len(module.text.encode()) for module in modules)
    return Measurement(num_bytes, num_tokens, total / num_tokens)


def make_optimizer(model: LlamaForCausalLM, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW; matrices decay, norms do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 4 % of the steps, then a cosine down to nothing."""
    warmup = max(1, steps // 25)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit(
    model: LlamaForCausalLM, tokenizer: FastTokenizer, parts: dict[str, list[Module]], args: argparse.Namespace
) -> float:
    """Trains in place and leaves the checkpoint of the lowest validation loss in the model; returns that loss."""
    device = torch.device(args.device)
    model.to(device)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    forward = torch.compile(model) if args.compile else model
    stream = batches(parts["training"], tokenizer.backend_tokenizer, args.batch_size, args.context, args.seed)
    best, best_loss = model.state_dict(), math.inf
    started = time.monotonic()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        batch = next(stream).to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.evaluate_every == 0 or step + 1 == args.steps:
            with torch.autocast(device.type, torch.bfloat16):
                validation = measure(model, tokenizer, parts["validation"], args.context).loss_per_token
            elapsed = time.monotonic() - started
            print(
                f"step {step + 1:5d}  train {loss.item():.4f}  validation {validation:.4f}  {elapsed:6.1f} s",
                flush=True,
            )
            if validation < best_loss:
                best_loss = validation
                best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    stream.close()
    model.load_state_dict(best)
    return best_loss


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    modules = read_modules(args.stdlib, tests=args.tests)
    parts = {name: [m for m in modules if m.part == name] for name in ("training", "validation", "heldout")}
    tokenizer = train_tokenizer([module.text for module in parts["training"]])
    for name, members in parts.items():
        print(f"{name}: {len(members)} modules, {sum(len(module.text.encode()) for module in members)} bytes")
    model = build_model()
    print(f"{model.num_parameters()} parameters on {args.device}, {args.steps} steps", flush=True)
    validation_loss = fit(model, tokenizer, parts, args)
    model.to(torch.bfloat16).float()  # measure what is saved
    heldout = measure(model, tokenizer, parts["heldout"], args.context)
    print(f"held-out: {heldout}")
    record = {
        "source": args.stdlib.name,
        "context": args.context,
        **asdict(heldout),
        "perplexity_per_token": heldout.perplexity_per_token,
        "perplexity_per_byte": heldout.perplexity_per_byte,
        "validation_loss_per_token": validation_loss,
        "heldout_modules": [module.path for module in parts["heldout"]],
        "validation_modules": [module.path for module in parts["validation"]],
    }
    save(model, tokenizer, record, args.output)


def evaluate(args: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(args.evaluate, dtype=torch.float32).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.evaluate)
    heldout = [module for module in read_modules(args.stdlib) if module.part == "heldout"]
    print(f"{len(heldout)} held-out modules: {measure(model, tokenizer, heldout, args.context)}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, metavar="FOLDER", help="train, and write the model here")
    target.add_argument("--evaluate", type=Path, metavar="FOLDER", help="measure the model that is here")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")), metavar="FOLDER")
    parser.add_argument(
        "--tests", action=argparse.BooleanOptionalAction, default=True, help="train on the library's tests as well"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32, help="windows a step")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens a window, at most 2048")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak of the schedule")
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--evaluate-every", type=int, default=200, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    args = parser.parse_args()
    if not 16 <= args.context <= CONTEXT:
        parser.error(f"--context is {args.context}; it must lie between 16 and {CONTEXT}")
    return args


if __name__ == "__main__":
    arguments = parse_args()
    evaluate(arguments) if arguments.evaluate else train(arguments)
