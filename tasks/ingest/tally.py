"""Counts of what happens while a corpus is read, each taken where it happens: the report's sums then check them."""

from collections import Counter
from dataclasses import dataclass, field

from tasks.ingest.document import SEPARATOR, Document
from tasks.ingest.record import NOTHING, REASONS, Reason, Record, Rejection, Size, size_of
from tasks.ingest.report import MAX_NAMED_GROUPS, Amounts, Documents, Records, SourceReport, SplitReport
from tasks.sources import Source


@dataclass
class SourceTally:
    """Counts of one source, and where each reason to reject a record was first met."""

    files: int = 0
    sha256: str = ""
    records: int = 0
    kept: int = 0
    reasons: Counter[Reason] = field(default_factory=Counter)
    first: dict[Reason, tuple[str, Rejection]] = field(default_factory=dict)
    empty_files: list[str] = field(default_factory=list)
    documents: int = 0
    out_documents: int = 0
    duplicates: int = 0
    read: Size = NOTHING
    out: Size = NOTHING
    rejected: Size = NOTHING
    duplicated: Size = NOTHING
    normalized: Size = NOTHING

    @property
    def rejections(self) -> int:
        return self.reasons.total()

    @property
    def reject_rate(self) -> float:
        """The share of rejected records; 0 where there are no records."""
        return self.rejections / self.records if self.records else 0.0

    def add_record(self, record: Record | Rejection, file: str) -> None:
        self.records += 1
        self.read += record.size
        if isinstance(record, Rejection):
            self.reasons[record.reason] += 1
            self.first.setdefault(record.reason, (file, record))
            self.rejected += record.size
        else:
            self.kept += 1
            self.normalized += record.size - size_of(record.text)

    def add_document(self, document: Document, size: Size, is_duplicate: bool) -> None:
        self.documents += 1
        separators = len(SEPARATOR) * (document.records - 1)
        self.normalized -= Size(separators, separators)
        if is_duplicate:
            self.duplicates += 1
            self.duplicated += size
        else:
            self.out_documents += 1
            self.out += size

    def replace_document(self, size: Size) -> None:
        """Counts a document as duplicated that was added as none: what is kept of its text is another's."""
        self.out_documents -= 1
        self.out -= size
        self.duplicates += 1
        self.duplicated += size

    def report(self, source: Source) -> SourceReport:
        reasons = {reason: self.reasons[reason] for reason in REASONS if self.reasons[reason]}
        return SourceReport(
            name=source.name,
            licence=source.licence,
            format=source.format,
            files=self.files,
            empty_files=len(self.empty_files),
            sha256=self.sha256,
            records=Records(in_=self.records, kept=self.kept, rejected=self.rejections, reasons=reasons),
            documents=Documents(in_=self.documents, out=self.out_documents, duplicated=self.duplicates),
            characters=self._amounts("characters"),
            bytes=self._amounts("bytes"),
        )

    def _amounts(self, unit: str) -> Amounts:
        read, out, rejected, duplicated, normalized = (
            getattr(size, unit) for size in (self.read, self.out, self.rejected, self.duplicated, self.normalized)
        )
        return Amounts(in_=read, out=out, rejected=rejected, duplicated=duplicated, normalized=normalized)


@dataclass
class SplitTally:
    """Counts of one split."""

    documents: int = 0
    size: Size = NOTHING
    groups: set[str] = field(default_factory=set)
    ungrouped: int = 0

    def add(self, group: str | None, size: Size) -> None:
        self.documents += 1
        self.size += size
        if group is None:
            self.ungrouped += 1
        else:
            self.groups.add(group)

    def report(self) -> SplitReport:
        groups = len(self.groups) + self.ungrouped
        return SplitReport(
            documents=self.documents,
            characters=self.size.characters,
            bytes=self.size.bytes,
            groups=groups,
            group_names=sorted(self.groups) if groups <= MAX_NAMED_GROUPS else None,
        )
