"""Qdrant's engine itself, which qdrant-edge-py runs in process, behind the calls of a client that search makes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import qdrant_edge as edge

KINDS = {name.lower(): getattr(edge.PayloadSchemaType, name) for name in ("Keyword", "Integer", "Float")}


class EngineInProcess:
    """One collection of multivectors with payload indexes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.metadata, self.shard = folder, None, None

    def collection_exists(self, _: str) -> bool:
        return self.shard is not None

    def create_collection(self, _: str, vectors_config: Any, metadata: Any) -> None:
        assert (vectors_config.distance.value, vectors_config.multivector_config.comparator.value) == ("Dot", "max_sim")
        multi = edge.MultiVectorConfig(comparator=edge.MultiVectorComparator.MaxSim)
        vector = edge.EdgeVectorParams(
            size=vectors_config.size, distance=edge.Distance.Dot, multivector_config=multi, on_disk=True
        )
        self.folder.mkdir(parents=True)
        self.shard = edge.EdgeShard.create(str(self.folder), edge.EdgeConfig(vectors={"": vector}))
        self.metadata = dict(metadata)

    def get_collection(self, _: str) -> Any:
        config = SimpleNamespace(metadata=self.metadata)
        return SimpleNamespace(config=config, indexed_vectors_count=0, status="green")

    def update_collection(self, _: str, metadata: Any) -> None:
        self.metadata = {**self.metadata, **metadata}

    def create_payload_index(self, _: str, field_name: str, field_schema: str, wait: bool) -> None:
        self.shard.update(edge.UpdateOperation.create_field_index(field_name, KINDS[field_schema]))

    def upsert(self, _: str, points: Any, wait: bool) -> None:
        made = [edge.Point(point.id, point.vector, point.payload) for point in points]
        self.shard.update(edge.UpdateOperation.upsert_points(made))

    def overwrite_payload(self, _: str, payload: Any, points: Any, wait: bool) -> None:
        self.shard.update(edge.UpdateOperation.overwrite_payload(points, payload))

    def delete(self, _: str, points_selector: Any, wait: bool) -> None:
        if points_selector.points:
            self.shard.update(edge.UpdateOperation.delete_points(points_selector.points))

    def scroll(self, _: str, with_vectors: bool, scroll_filter: Any = None, **settings: Any) -> Any:
        wanted = scroll_filter and filter_of(scroll_filter)
        return self.shard.scroll(edge.ScrollRequest(with_vector=with_vectors, filter=wanted, **settings))

    def retrieve(self, _: str, ids: Any, with_payload: bool, with_vectors: bool) -> Any:
        return self.shard.retrieve(ids, with_payload, with_vectors)

    def count(self, _: str, count_filter: Any, exact: bool) -> Any:
        request = edge.CountRequest(exact=exact, filter=count_filter and filter_of(count_filter))
        return SimpleNamespace(count=self.shard.count(request))

    def facet(self, _: str, key: str, limit: int, exact: bool) -> Any:
        return self.shard.facet(edge.FacetRequest(key=key, limit=limit, exact=exact))

    def query_points(
        self, _: str, query: Any, query_filter: Any, search_params: Any, with_vectors: bool, **settings: Any
    ) -> Any:
        request = edge.QueryRequest(
            query=edge.Query.Nearest(query),
            filter=query_filter and filter_of(query_filter),
            params=edge.SearchParams(exact=search_params.exact, hnsw_ef=search_params.hnsw_ef),
            with_vector=with_vectors,
            **settings,
        )
        return SimpleNamespace(points=self.shard.query(request))


def filter_of(found: Any) -> Any:
    """Translate a filter of the client into the engine's own classes, one by one."""
    parts = {name: getattr(found, name) for name in ("must", "should", "must_not")}
    return edge.Filter(**{name: [_condition(part) for part in some] for name, some in parts.items() if some})


def _condition(found: Any) -> Any:
    kind = type(found).__name__
    if kind == "Filter":
        return filter_of(found)
    if kind == "NestedCondition":
        return edge.NestedCondition(found.nested.key, filter_of(found.nested.filter))
    assert kind == "FieldCondition", kind
    if found.range is not None:
        return edge.FieldCondition(found.key, range=edge.RangeFloat(**found.range.model_dump()))
    if hasattr(found.match, "any"):
        return edge.FieldCondition(found.key, match=edge.MatchAny(list(found.match.any)))
    return edge.FieldCondition(found.key, match=edge.MatchValue(found.match.value))
