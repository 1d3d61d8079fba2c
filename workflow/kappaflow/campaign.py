"""What the Snakefile knows: the checked configuration, the material list and its chunks. Cheap to make."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from kappaflow import chunks, materials
from kappaflow.config import DFT_ENGINES, ConfigError, complete, merged
from kappaflow.protocol import Protocol, digest
from kappaflow.srme import structures as srme_structures
from kappaflow.surrogates.registry import CONSTANTS, DESCRIPTORS, feature_set, features, is_network

COMPUTED = "computed"
"""Name of the labelled table of the campaign's own conductivities."""

INGESTED = "ingested"
"""Engine of the materials whose forces were not computed here."""


@dataclass(frozen=True)
class Campaign:
    """A configuration with all defaults, the physics it asks for, and the crystals it names."""

    config: dict[str, Any]
    protocol: Protocol
    entries: list[materials.Entry]

    @classmethod
    def load(cls, config: Mapping[str, Any]) -> Campaign:
        """Check everything that can be checked without reading a crystal.

        Raises ConfigError or ValueError, in one line, for a wrong configuration or material list.
        """
        full = complete(config)
        benchmark = _list_srme(full)
        protocol = Protocol.from_config(_with_srme_cells(full, benchmark))
        entries = _list_materials(full, benchmark)
        used = {entry.engine for entry in entries} | ({INGESTED} if full["ingest"]["sources"] else set())
        if benchmark:
            _check_srme(full["srme"], protocol)
        _check_born(full["born"], protocol, entries)
        if used:
            _check_labels(full["labels"], protocol, used)
        elif not full["ingest"]["tables"]:
            raise ConfigError("config.materials: found an empty list, allowed only with ingest")
        return cls(full, protocol, entries)

    def born_files(self, chunk: str) -> dict[str, str]:
        """The file BORN of each material of a chunk that has one, where the protocol asks for them."""
        if self.protocol.nac.method != "born":
            return {}
        return {entry.material_id: path for entry in self._entries(self.chunks[chunk]) if (path := self._born(entry))}

    @property
    def with_born(self) -> list[str]:
        """The materials of the present list that have a file BORN, where the protocol asks for them."""
        return [name for chunk in self.computed_chunks for name in self.born_files(chunk)]

    def _born(self, entry: materials.Entry) -> str | None:
        if entry.born or not self.config["born"]:
            return entry.born
        names = (f"BORN_{entry.material_id}", os.path.join(entry.material_id, "BORN"))
        paths = [os.path.join(self.config["born"], name) for name in names]
        return next((path for path in paths if os.path.isfile(path)), None)

    @property
    def manifest(self) -> str:
        """Path of the file that keeps which material is in which chunk."""
        return os.path.join(self.config["results"], "chunks.csv")

    @cached_property
    def places(self) -> dict[str, chunks.Place]:
        """The chunk and extension of every material, those of earlier lists included."""
        engines = {entry.material_id: entry.engine for entry in self.entries}
        return chunks.assign(engines, chunks.read_manifest(self.manifest), self.config["chunk_size"], engines)

    @cached_property
    def computed_chunks(self) -> dict[str, list[str]]:
        """The materials of the present list in each chunk."""
        return chunks.members(self.places, [entry.material_id for entry in self.entries])

    @cached_property
    def ingested_chunks(self) -> dict[str, list[str]]:
        """The materials with ingested forces in each chunk; empty until `snakemake ingest` has run."""
        if not self.config["ingest"]["sources"]:
            return {}
        places = chunks.read_manifest(os.path.join(self.ingest, "chunks.csv"))
        return chunks.members(places, places)

    @cached_property
    def chunks(self) -> dict[str, list[str]]:
        """All materials that have or get forces, by chunk."""
        return {**self.computed_chunks, **self.ingested_chunks}

    @property
    def ingest(self) -> str:
        """Path of the folder that keeps what was ingested."""
        return os.path.join(self.config["results"], "ingest")

    def _check_ingested(self) -> None:
        sources, record = self.config["ingest"]["sources"], Path(self.ingest, "sources.json")
        if sources and not (record.exists() and json.loads(record.read_text()) == sources):
            names = ", ".join(sources)
            raise ConfigError(
                f"config.ingest.sources: {names} not read, or changed since; run `snakemake ingest` first"
            )

    @cached_property
    def extensions(self) -> dict[int, list[str]]:
        """The materials of the present list that each extension brought."""
        return chunks.extensions(self.places, [entry.material_id for entry in self.entries])

    def structures(self, chunk: str | None = None) -> list[str]:
        """The tables of structures of the material list: all of them, or the one that a chunk's materials stand in.

        Each extension of the list has a table of its own, so that a longer list touches no old one.
        """
        if chunk is not None and chunk not in self.computed_chunks:
            raise ValueError(f"chunk: found {chunk!r}, allowed: those of the present material list")
        numbers = self.extensions if chunk is None else [self.places[self.computed_chunks[chunk][0]].extension]
        return [self.structures_of(number) for number in numbers]

    def structures_with(self, chunk: str) -> list[str]:
        """The tables that the structures of a chunk's materials, computed or ingested, stand in."""
        if chunk in self.ingested_chunks:
            return [os.path.join(self.ingest, "structures", f"{chunk}.parquet")]
        return self.structures(chunk)

    def all_structures(self) -> list[str]:
        """The tables of structures of the material list and of ingested materials.

        Raises ConfigError where the sources were not read yet (what is in them would be left out silently), and for an
        id that stands in both.
        """
        self._check_ingested()
        ids = {name for members in self.ingested_chunks.values() for name in members}
        if both := ids & set(self._by_id):
            raise ConfigError(f"material_id {min(both)!r}: found in the material list and among ingested sets")
        return [
            *self.structures(),
            *(os.path.join(self.ingest, "structures", f"{chunk}.parquet") for chunk in self.ingested_chunks),
        ]

    def structures_before(self, extension: int) -> list[str]:
        """The tables of structures of earlier extensions, which a later one must not duplicate."""
        return [self.structures_of(number) for number in self.extensions if number < extension]

    def structures_of(self, extension: int) -> str:
        """Path of the table of structures of one extension."""
        return os.path.join(self.config["results"], "structures", f"{extension}.parquet")

    def entries_of(self, extension: int) -> list[materials.Entry]:
        """The entries of the present list that an extension brought."""
        return self._entries(self.extensions[extension])

    @cached_property
    def _by_id(self) -> dict[str, materials.Entry]:
        return {entry.material_id: entry for entry in self.entries}

    def _entries(self, material_ids: Iterable[str] | None) -> list[materials.Entry]:
        return self.entries if material_ids is None else [self._by_id[name] for name in material_ids]

    def entry(self, material_id: str) -> materials.Entry:
        """The entry of a material of the present list."""
        return self._by_id[material_id]

    def files(self, material_ids: Iterable[str] | None = None) -> list[str]:
        """The existing structure files of the materials (of all by default).

        Prototype rows have none: what they say is in ``fingerprint``, so that a longer list re-runs nothing.
        """
        paths = dict.fromkeys(entry.path for entry in self._entries(material_ids) if entry.row is None)
        return [path for path in paths if os.path.isfile(path)]

    def fingerprint(self, material_ids: Iterable[str] | None = None) -> str:
        """Hash of what the list says of the materials (of all by default)."""
        said = [(e.material_id, os.path.basename(e.path), e.frame, e.row) for e in self._entries(material_ids)]
        return digest(said)

    @cached_property
    def engines(self) -> dict[str, dict[str, Any]]:
        """The engines that the list uses, by name."""
        every = {"default": self.config["engine"], **self.config["engines"]}
        return {name: every[name] for name in dict.fromkeys(entry.engine for entry in self.entries)}

    def engine_name(self, chunk: str) -> str:
        """Name of the engine of a chunk's materials."""
        return INGESTED if chunk in self.ingested_chunks else self._by_id[self.computed_chunks[chunk][0]].engine

    def engine(self, chunk: str) -> dict[str, Any]:
        """The engine of a chunk's materials, which are not ingested."""
        return self.engines[self.engine_name(chunk)]

    def engines_of(self, extension: int) -> dict[str, dict[str, Any]]:
        """The engines of the materials that an extension brought, by name."""
        used = {entry.engine for entry in self.entries_of(extension)}
        return {name: engine for name, engine in self.engines.items() if name in used}

    def is_dft(self, chunk: str) -> bool:
        """Whether a chunk's calculations run in bulk jobs."""
        return chunk in self.computed_chunks and self.engine(chunk)["name"] in DFT_ENGINES

    @property
    def ladder_chunks(self) -> list[str]:
        """The chunks whose unstable crystals go through the ladder: all or none."""
        return list(self.chunks) if self.protocol.ladder.rungs else []

    def ladder_engine(self, chunk: str) -> dict[str, Any] | None:
        """The engine that computes new forces within the job; None for ingested sets and for DFT."""
        return self.engine(chunk) if chunk in self.computed_chunks and not self.is_dft(chunk) else None

    @property
    def has_dft(self) -> bool:
        """Whether any calculation runs in bulk jobs."""
        return any(engine["name"] in DFT_ENGINES for engine in self.engines.values())

    @property
    def audited(self) -> dict[str, dict[str, Any]]:
        """The potentials that an audit tests, by name: those of the list, or the default of an empty list."""
        used = self.engines or {"default": self.config["engine"]}
        return {name: engine for name, engine in used.items() if engine["name"] not in DFT_ENGINES}

    @property
    def audit_files(self) -> list[str]:
        """The files with the crystals of an audit; raises ConfigError where one is not there."""
        try:
            entries = materials.list_materials(self.config["audit"]["structures"] or [])
        except ValueError as error:
            raise ConfigError(f"config.audit.structures: {str(error).removeprefix('materials: ')}") from None
        return list(dict.fromkeys(entry.path for entry in entries))

    def plan_digest(self, gpu_engines: Iterable[str]) -> str:
        """Hash of what a plan is made from."""
        files = [sha256(Path(path).read_bytes()).hexdigest() for path in self.files()]
        settings = [self.protocol.hash, self.engines, self.config["structures"], list(gpu_engines)]
        return digest([self.fingerprint(), files, settings])

    @property
    def jobs(self) -> str:
        """Path of the folder that keeps bulk jobs."""
        return os.path.join(self.config["results"], "jobs")

    @property
    def retries(self) -> int | None:
        """How often a job of the stages with calculations is submitted again; None is what the profile says."""
        return self.config["jobs"]["retries"] if self.has_dft else None

    def max_attempts(self, chunk: str) -> int | None:
        """The one setting of bulk jobs whose change runs a stage again."""
        return self.config["jobs"]["max_attempts"] if self.is_dft(chunk) else None

    @property
    def label_engine(self) -> str:
        """The engine whose conductivities become labels."""
        return self.config["labels"]["engine"] or next(iter(self.engines), INGESTED)

    @property
    def label_sources(self) -> list[str]:
        """Names of the labelled tables that are benchmarked: the campaign's own, and those from elsewhere."""
        every = [COMPUTED] * bool(self.chunks) + list(self.config["ingest"]["tables"])
        chosen = self.config["benchmark"]["sources"]
        if chosen is not None and (unknown := sorted(set(chosen) - {*every, COMPUTED})):
            raise ConfigError(f"config.benchmark.sources: found {unknown[0]!r}, allowed: {', '.join(every)}")
        return [source for source in every if chosen is None or source in chosen]

    @cached_property
    def known_models(self) -> dict[str, dict[str, Any]]:
        """The surrogates of the config and the constants, by name, with their settings."""
        return {**{name: {} for name in CONSTANTS}, **self.config["surrogates"]["models"]}

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """The surrogates that are compared, by name, with their settings."""
        chosen = self.config["benchmark"]["models"] or self.config["surrogates"]["models"]
        return {name: self.known_models[name] for name in chosen}

    @property
    def splits(self) -> list[str]:
        """Names of the splits that are benchmarked."""
        return list(self.config["benchmark"]["splits"] or self.config["splits"])

    @property
    def seeds(self) -> list[int]:
        """Seeds of the benchmark."""
        return list(self.config["benchmark"]["seeds"])

    @property
    def fits(self) -> list[tuple[str, str, int]]:
        """(split, model, seed) of every fit of the benchmark of one table, learning curves included."""
        curve = self.config["benchmark"]["learning_curve"]
        parts = [f"{curve['split']}@{percent}" for percent in sorted(curve["percents"])]
        curved = curve["models"] or [name for name, settings in self.models.items() if not is_network(name, settings)]
        runs = [(split, list({**self.models, **dict.fromkeys(self._constants(split))})) for split in self.splits]
        runs += [(part, [name for name in curved if name in self.models]) for part in parts]
        return [(split, model, seed) for split, models in runs for model in models for seed in self.seeds]

    @staticmethod
    def _constants(split: str) -> list[str]:
        """The constants without which a leaderboard of this split would flatter."""
        median, boundary = CONSTANTS
        return [median, *([boundary] if split.startswith("ood_") else [])]

    @property
    def all_splits(self) -> list[tuple[str, int]]:
        """(split, seed) of every split that the fits need."""
        return list(dict.fromkeys((split, seed) for split, _, seed in self.fits))

    def features_of(self, model: str) -> list[str]:
        """Feature sets that the fit of a model reads: its own, those of distances, and phonons where a model has
        them."""
        own = features(model, self.known_models[model])
        return list(dict.fromkeys([*own, *DESCRIPTORS, *(["phonons"] if "phonons" in self.feature_sets else [])]))

    @property
    def feature_sets(self) -> list[str]:
        """Feature sets that the benchmark needs."""
        return list(
            dict.fromkeys([*DESCRIPTORS, *(x for name, said in self.models.items() for x in features(name, said))])
        )

    def feature_settings(self, name: str) -> dict[str, Any]:
        """Kind and options of a feature set."""
        return feature_set(name, self.config["surrogates"]["features"])

    @property
    def phonon_features(self) -> list[str]:
        """The chunks whose phonons are features of any labelled table."""
        if "phonons" not in self.feature_sets:
            return []
        return list(dict.fromkeys(chunk for source in self.label_sources for chunk in self.phonon_chunks(source)))

    def phonon_chunks(self, source: str) -> list[str]:
        """The chunks whose phonons may be features of a labelled table: not those that its labels come from."""
        own = self.label_engine if source == COMPUTED else None
        return [chunk for chunk in self.computed_chunks if self.engine_name(chunk) != own]

    def with_conductivities(self, source: str) -> str:
        """Folder with the tables of materials and conductivities that a labelled table is made from."""
        parts = ["dataset"] if source == COMPUTED else ["ingest", "tables", source]
        return os.path.join(self.config["results"], *parts)

    def labelled(self, source: str) -> dict[str, Any]:
        """Which of those conductivities are labels: arguments of ``labels.from_tables``."""
        settings = self.config["labels"]
        selection = {"temperature": settings["temperature"]}
        if source == COMPUTED:
            origins = [COMPUTED, *self.config["ingest"]["sources"]]
            return {**selection, "origins": origins, "engine": self.label_engine, "method": settings["method"]}
        bounds = {key: self.config["ingest"]["tables"][source].get(key) for key in ("min_kappa", "max_kappa")}
        return {**selection, "origins": [source], "engine": INGESTED, **bounds}

    @cached_property
    def srme_materials(self) -> dict[str, str]:
        """The id in the structures file of each material of the kappa-103 benchmark, by material_id."""
        return {
            _name(entry.material_id, engine): entry.material_id
            for engine in self.config["srme"]["engines"]
            for entry in _list_srme(self.config)
        }

    def srme_materials_of(self, chunk: str) -> dict[str, str]:
        """The same of the materials of a chunk."""
        return {name: self.srme_materials[name] for name in self.chunks[chunk] if name in self.srme_materials}

    def srme_chunks(self) -> list[str]:
        """The chunks with materials of the kappa-103 benchmark.

        Raises ConfigError where the config does not name what the benchmark needs.
        """
        for key in ("structures", "reference"):
            if self.config["srme"][key] is None:
                raise ConfigError(f"config.srme.{key}: found null, allowed: the file of the benchmark (docs/srme.md)")
        if not os.path.isfile(self.config["srme"]["reference"]):
            path = self.config["srme"]["reference"]
            raise ConfigError(f"config.srme.reference: {path}: not found, allowed: a json file (docs/srme.md)")
        return list(dict.fromkeys(self.places[name].chunk for name in self.srme_materials))

    @property
    def has_frequencies(self) -> bool:
        """Whether there are materials of the reference of the comparison of frequencies, and of other engines."""
        reference = self.config["frequencies"]["reference"]
        return {reference} < {self.engine_name(chunk) for chunk in self.chunks}

    def frequency_chunks(self) -> list[str]:
        """The chunks whose frequencies are compared, those of the reference among them.

        Raises ConfigError where there is nothing to compare.
        """
        self._check_ingested()
        if not self.has_frequencies:
            found = ", ".join(dict.fromkeys(self.engine_name(chunk) for chunk in self.chunks))
            raise ConfigError(
                f"config.frequencies.reference: found {self.config['frequencies']['reference']!r}, and materials of "
                f"{found}; allowed: one of at least two (docs/frequencies.md)"
            )
        return list(self.chunks)

    @property
    def provenance(self) -> dict[str, Any]:
        """The physics as plain data, for rules and tables."""
        return {"protocol": self.protocol.as_dict(), "protocol_hash": self.protocol.hash}

    def displacements(self, chunk: str) -> dict[str, Any]:
        """The section for displacements, with the method of the chunk's engine where the config has none."""
        from kappaflow import engines

        rules = self.protocol.displacements
        if chunk in self.computed_chunks:
            rules = rules.for_engine(engines.create(self.engine(chunk)))
        return asdict(rules)

    def early_verdict(self, chunk: str) -> dict[str, Any] | None:
        """How FC2 of a chunk's crystals is judged before FC3 is begun; None where FC3 does not wait for that."""
        if self.protocol.stability.fc3_of_unstable or self.protocol.ladder.rungs or self.is_dft(chunk):
            return None
        return self.section("stability")

    def section(self, name: str) -> dict[str, Any]:
        """One section of the protocol as plain data."""
        return asdict(getattr(self.protocol, name))


def _name(material_id: str, engine: str) -> str:
    """What a material is called that an engine computes."""
    return material_id if engine == "default" else f"{material_id}-{engine}"


def _list_srme(config: Mapping[str, Any]) -> list[materials.Entry]:
    """The crystals of the kappa-103 benchmark, with their ids in its structures file."""
    path = config["srme"]["structures"]
    return srme_structures.list_entries(path) if path else []


def _with_srme_cells(config: Mapping[str, Any], benchmark: list[materials.Entry]) -> dict[str, Any]:
    """The section ``protocol`` with supercells and meshes of the benchmark's structures file, where it has none."""
    if not benchmark:
        return dict(config["protocol"])

    def names(material_id: str) -> list[str]:
        return [_name(material_id, engine) for engine in config["srme"]["engines"]]

    cells = srme_structures.protocol_changes(benchmark, config["structures"]["symprec"], names)
    return merged(cells, config["protocol"])


def _check_born(folder: str | None, protocol: Protocol, entries: Iterable[materials.Entry]) -> None:
    if protocol.nac.method != "born":
        return
    if folder is None and not any(entry.born for entry in entries):
        raise ConfigError(
            "config.protocol.nac.method: found born, allowed only with the folder `born` or a column born in the list"
        )
    if folder is not None and not os.path.isdir(folder):
        raise ConfigError(f"config.born: {folder}: not found, allowed: a folder with files BORN")
    for entry in entries:
        if entry.born and not os.path.isfile(entry.born):
            raise ConfigError(f"{entry.source}: born: {entry.born}: not found, allowed: a file BORN of phonopy")


def _check_srme(settings: Mapping[str, Any], protocol: Protocol) -> None:
    computed = protocol.conductivity
    if "rta" not in computed.methods:
        raise ConfigError(
            f"config.protocol.conductivity.methods: found {computed.methods}, allowed with srme: rta among them"
        )
    if settings["temperature"] not in computed.temperatures:
        raise ConfigError(
            f"config.srme.temperature: found {settings['temperature']}, allowed: one of "
            f"protocol.conductivity.temperatures ({', '.join(f'{t:g}' for t in computed.temperatures)})"
        )


def _list_materials(config: Mapping[str, Any], benchmark: list[materials.Entry]) -> list[materials.Entry]:
    """The entries of each engine, in the order of the sources, then those of the kappa-103 benchmark.

    Raises ConfigError for an unknown engine and for an id that is given twice.
    """
    listed: list[tuple[str, materials.Entry]] = []
    sources: dict[str, list[str]] = {}
    for item in config["materials"]:
        source, engine = (item, "default") if isinstance(item, str) else (item["source"], item["engine"])
        _check_engine("materials", config, engine, of=f" of {source}")
        sources.setdefault(engine, []).append(source)
    listed.extend((engine, entry) for engine, own in sources.items() for entry in materials.list_materials(own))
    for engine in config["srme"]["engines"] if benchmark else []:
        _check_engine("srme.engines", config, engine)
        listed.extend((engine, entry) for entry in benchmark)
    entries: dict[str, materials.Entry] = {}
    for engine, entry in listed:
        name = _name(entry.material_id, engine)
        if name in entries:
            raise ConfigError(f"config.materials: found material_id {name!r} twice, allowed: each id once")
        entries[name] = replace(entry, material_id=name, engine=engine)
    return list(entries.values())


def _check_engine(key: str, config: Mapping[str, Any], engine: str, of: str = "") -> None:
    if engine not in ("default", *config["engines"]):
        allowed = ", ".join(("default", *config["engines"]))
        raise ConfigError(f"config.{key}: found engine {engine!r}{of}, allowed: {allowed}")


def _check_labels(labels: Mapping[str, Any], protocol: Protocol, engines: Collection[str]) -> None:
    computed = protocol.conductivity
    if labels["engine"] is not None and labels["engine"] not in engines:
        raise ConfigError(
            f"config.labels.engine: found {labels['engine']!r}, allowed: null or one that the materials use "
            f"({', '.join(sorted(engines))})"
        )
    if labels["method"] not in computed.methods:
        raise ConfigError(
            f"config.labels.method: found {labels['method']!r}, allowed: one of "
            f"protocol.conductivity.methods ({', '.join(computed.methods)})"
        )
    if labels["temperature"] not in computed.temperatures:
        raise ConfigError(
            f"config.labels.temperature: found {labels['temperature']}, allowed: one of "
            f"protocol.conductivity.temperatures ({', '.join(f'{t:g}' for t in computed.temperatures)})"
        )
