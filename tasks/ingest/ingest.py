"""Reads the collected files and writes the corpus: valid, normalized, free of duplicates, split by group."""

import hashlib
import itertools
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import pyarrow as pa

from tasks import atomic, paths
from tasks.errors import BadInput
from tasks.ingest.document import Document, digest, join
from tasks.ingest.file_group import group_of_file
from tasks.ingest.params import IngestParams
from tasks.ingest.readers import FileReader
from tasks.ingest.record import Reason, Record, Rejection, size_of
from tasks.ingest.report import CorpusReport
from tasks.ingest.split import SPLITS, SplitName, Texts, split_of
from tasks.ingest.tables import CHAT_SCHEMA, CORPUS_SCHEMA, QUARANTINE_SCHEMA, Row, TableWriter, read_rows
from tasks.ingest.tally import SourceTally, SplitTally
from tasks.progress import Progress, progress
from tasks.sources import FILE_FORMATS, CollectParams, Format, Source, has_ending, printable

# Where the quarantine of a failed attempt can be read: the corpus it belongs to does not come to be.
REFUSED = paths.SCRATCH / paths.QUARANTINE.name
_REASONS_TOLD = 3
_FILES_TOLD = 3


def ingest(collect: CollectParams, params: IngestParams) -> CorpusReport:
    """Writes ``data/corpus`` from ``data/raw`` and returns its report.

    Raises :class:`BadInput` for a source that was not collected, a damaged file, too many rejected records, and a
    split that came out empty.
    """
    files = {source.name: _files_of(source) for source in collect.sources}
    total = sum(file.stat().st_size for listed in files.values() for file in listed)
    with atomic.folder(paths.CORPUS) as folder, progress("ingest") as shown:
        shown.begin("read")
        try:
            report = _write(collect, params, files, folder, _Bytes(shown, total))
        except BadInput:
            _keep(folder / paths.QUARANTINE.name)
            raise
        atomic.write_json(folder / paths.CORPUS_REPORT.name, report.model_dump(by_alias=True))
    REFUSED.unlink(missing_ok=True)
    return report


@dataclass
class _Bytes:
    """Progress in bytes of raw files, and how many records of all sources are ``rejected``."""

    shown: Progress
    total: int
    of_finished_files: int = 0
    rejected: int = 0

    def update(self, position: int) -> None:
        # A block is read long before its last record: only the end of the last file is the end.
        done = min(self.of_finished_files + position, self.total - 1)
        self.shown.update(done, self.total, "bytes", rejected=self.rejected)

    def finish(self, file: Path) -> None:
        self.of_finished_files += file.stat().st_size
        self.shown.update(self.of_finished_files, self.total, "bytes", rejected=self.rejected)


@dataclass
class _Corpus:
    """The corpus as it grows: the writers of the splits, the counts, and which split each text belongs to."""

    params: IngestParams
    schema: pa.Schema
    writers: dict[SplitName, TableWriter]
    quarantine: TableWriter
    tallies: dict[SplitName, SplitTally] = field(default_factory=lambda: {name: SplitTally() for name in SPLITS})
    sources: dict[str, SourceTally] = field(default_factory=dict)
    texts: Texts = field(default_factory=Texts)

    def add(self, document: Document, source: Source, name: str) -> None:
        text = digest(document.text)
        size = size_of(document.text)
        group = group_of_file(name) if source.holds_files else document.group
        # Without a group the text itself decides, of several records the first: others may come behind it. A line's
        # number would change with every line added before it.
        split = split_of(digest(document.first) if group is None else group.encode(), self.params.split)
        is_duplicate = not self.texts.add(text, split)
        self.sources[source.name].add_document(document, size, is_duplicate)
        if is_duplicate:
            return
        row: Row = (document.text, source.name, group, f"{source.name}/{name}:{document.line}")
        if self.schema is CHAT_SCHEMA:
            row = (*row, source.messages_field is not None)
        self.writers[split].write(row, size.bytes)
        self.tallies[split].add(group, size)

    def refuse(self, rejection: Rejection, source: Source, name: str) -> None:
        what = (rejection.reason, rejection.digest, rejection.size.bytes, rejection.detail)
        self.quarantine.write((source.name, name, rejection.line, *what), len(name) + len(rejection.digest))

    def settle(self, folder: Path, shown: Progress) -> None:
        """Writes anew, without them, the splits that texts have left since they were written."""
        left = self.texts.left()
        done, total = 0, sum(self.tallies[split].documents for split in left)
        shown.begin("settle")
        for split in left:
            written = (folder / split).rename(folder / f"{atomic.PARTIAL}{split}")
            self.tallies[split] = SplitTally()
            with TableWriter(_parts(folder / split), self.schema) as writer:
                for text, source, group, *more in read_rows(written):
                    size = size_of(text)
                    if self.texts.belongs(digest(text), split):
                        writer.write((text, source, group, *more), size.bytes)
                        self.tallies[split].add(group, size)
                    else:
                        self.sources[source].replace_document(size)
                    done += 1
                    shown.update(done, total, "documents")
            shutil.rmtree(written)


def _write(
    collect: CollectParams, params: IngestParams, files: dict[str, list[Path]], folder: Path, done: _Bytes
) -> CorpusReport:
    with ExitStack() as stack:
        schema = CHAT_SCHEMA if any(source.messages_field for source in collect.sources) else CORPUS_SCHEMA
        writers = {name: stack.enter_context(TableWriter(_parts(folder / name), schema)) for name in SPLITS}
        quarantine = TableWriter(iter([folder / paths.QUARANTINE.name]), QUARANTINE_SCHEMA)
        corpus = _Corpus(params, schema, writers, stack.enter_context(quarantine))
        for source in collect.sources:
            _read_source(source, files[source.name], corpus, done)
    corpus.settle(folder, done.shown)
    _check_splits(corpus)
    sources = [corpus.sources[source.name].report(source) for source in collect.sources]
    splits = {name: tally.report() for name, tally in corpus.tallies.items()}
    return CorpusReport(sources=sources, splits=splits)


def _read_source(source: Source, files: list[Path], corpus: _Corpus, done: _Bytes) -> None:
    tally = corpus.sources[source.name] = SourceTally(files=len(files))
    sha256 = hashlib.sha256()
    for file in files:
        name = file.relative_to(paths.RAW / source.name).as_posix()
        sha256.update(f"{_sha256(file)}  {name}\n".encode())
        before = tally.records
        for document in join(
            _kept(FileReader(file, source, corpus.params.max_line_bytes), source, name, corpus, tally, done)
        ):
            corpus.add(document, source, name)
        done.finish(file)
        if tally.records == before:
            tally.empty_files.append(name)
    _tell_empty(source, tally, done.shown)
    _check_rate(source, tally, corpus.params)
    _tell_rejected_files(source, tally, done.shown)
    tally.sha256 = sha256.hexdigest()


def _kept(
    reader: FileReader, source: Source, name: str, corpus: _Corpus, tally: SourceTally, done: _Bytes
) -> Iterator[Record]:
    for record in reader:
        tally.add_record(record, name)
        done.rejected += isinstance(record, Rejection)
        done.update(reader.position)
        if isinstance(record, Rejection):
            corpus.refuse(record, source, name)
        else:
            yield record


def _files_of(source: Source) -> list[Path]:
    folder = paths.RAW / source.name
    found = []
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.exists():
            raise BadInput(f"{printable(path)}: a link to a file that is not there. Remove the link and collect again.")
        # What a killed attempt of collecting left behind does not count.
        if path.is_file() and not path.name.startswith(atomic.PARTIAL):
            _check_name(path)
            _check_format(path, source)
            found.append(path)
    if not found:
        raise BadInput(f"{folder}: no file of source '{source.name}'. Collect first: python -m tasks.collect")
    return sorted(found, key=lambda path: path.as_posix())


def _check_name(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise BadInput(f"{printable(path)}: its name is not UTF-8. Rename the file.") from None


def _check_format(path: Path, source: Source) -> None:
    """Raises :class:`BadInput` for a file of another format, as the source has left it that had this name before."""
    # One that the source names by itself is taken whatever its ending.
    if path.name == Path(source.uri).name:
        return
    other = next((format_ for format_ in get_args(Format) if has_ending(path.name, format_)), source.format)
    # Files that are one text each are read alike.
    if other != source.format and not (source.holds_files and other in FILE_FORMATS):
        raise BadInput(
            f"{printable(path)}: a file of {other}, and source '{source.name}' has the format {source.format} in "
            f"params.yaml. If the format was changed, remove what was collected before from {paths.RAW / source.name}, "
            "or give the source another name."
        )


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(
            f"{printable(file)}: cannot be read ({error.strerror}). Mend its permissions, or remove it and collect."
        ) from None


def _parts(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    for index in itertools.count():
        yield folder / f"part-{index:05d}.parquet"


def _check_rate(source: Source, tally: SourceTally, params: IngestParams) -> None:
    if tally.reject_rate <= params.max_reject_rate:
        return
    told = _tell_reasons(source, tally)
    longer = " (or ingest.max_line_bytes, for the lines that are too long)" if "line too long" in tally.reasons else ""
    fields = ", or the names of its fields" if "missing field" in tally.reasons else ""
    raise BadInput(
        f"source '{source.name}': {tally.rejections:,} of {tally.records:,} records are rejected "
        f"({tally.reject_rate:.2%}; ingest.max_reject_rate allows {params.max_reject_rate:.2%}): {told}. "
        f"{REFUSED} lists them; mend the source (what is gone from it stays in data/raw until you delete it there)"
        f"{fields}, or raise the rate{longer} in params.yaml."
    )


def _tell_rejected_files(source: Source, tally: SourceTally, shown: Progress) -> None:
    """Tells of whole texts that are not in the corpus, however few. A record among others is counted alone."""
    if not source.holds_files or not tally.rejections:
        return
    what = "1 file is" if tally.rejections == 1 else f"{tally.rejections:,} files are"
    shown.notice(f"{source.name}: {what} rejected and left out: {_tell_reasons(source, tally)}")


def _tell_reasons(source: Source, tally: SourceTally) -> str:
    commonest = [reason for reason, _ in tally.reasons.most_common(_REASONS_TOLD)]
    told = "; ".join(_tell_reason(source, reason, tally) for reason in commonest)
    if left := len(tally.reasons) - len(commonest):
        told += f"; and {left} more reason{'s' if left > 1 else ''}"
    return told


def _tell_reason(source: Source, reason: Reason, tally: SourceTally) -> str:
    file, rejection = tally.first[reason]
    place = printable(paths.RAW / source.name / file)
    # A text is its file: all of it is rejected, whatever the line.
    line = "" if source.holds_files else f" line {rejection.line:,}"
    detail = f": {rejection.detail}" if rejection.detail else ""
    return f"{reason} ({tally.reasons[reason]:,}, first in {place}{line}{detail})"


def _tell_empty(source: Source, tally: SourceTally, shown: Progress) -> None:
    if not tally.empty_files:
        return
    folder, count = paths.RAW / source.name, len(tally.empty_files)
    names = ", ".join(printable(folder / name) for name in tally.empty_files[:_FILES_TOLD])
    more = f" and {count - _FILES_TOLD:,} more" if count > _FILES_TOLD else ""
    what = "1 file holds no text and is left out" if count == 1 else f"{count:,} files hold no text and are left out"
    shown.notice(f"{source.name}: {what} ({names}{more})")


def _check_splits(corpus: _Corpus) -> None:
    if not any(tally.documents for tally in corpus.tallies.values()):
        raise BadInput(
            f"{paths.RAW}: the corpus is empty: no source holds a record with text. "
            "Check what was collected, and uri, format and text_field in params.yaml."
        )
    split = corpus.params.split
    for name, tally in corpus.tallies.items():
        if not tally.documents:
            groups = sum(len(other.groups) + other.ungrouped for other in corpus.tallies.values())
            count = "1 group" if groups == 1 else f"{groups:,} groups"
            if groups < len(corpus.tallies):
                raise BadInput(
                    f"{paths.RAW}: the {name} split is empty: {count}, and {', '.join(corpus.tallies)} need one each "
                    "at least. Collect more text (of txt and md each file is a group), or choose a group_field with "
                    "more values."
                )
            share = "lower ingest.split.valid and test" if name == "train" else f"raise ingest.split.{name}"
            raise BadInput(
                f"{paths.RAW}: the {name} split is empty: {count}, dealt out by ingest.split.seed {split.seed} "
                f"with valid {split.valid} and test {split.test}. Change the seed, {share}, collect more text, or "
                "choose a group_field with more values."
            )


def _keep(quarantine: Path) -> None:
    if quarantine.exists():
        with atomic.file(REFUSED) as kept, quarantine.open("rb") as content:
            shutil.copyfileobj(content, kept)
