"""A Ray Data stage: `Dataset.map_batches` with `Generate` has every row answered by the actors of a served model.

Ray Data reads, shuffles and writes; a worker of the stage has a pool and waits. Many workers, on any nodes, may use one
model. Where `raylm serve` does not serve it, `serving` does for as long as a job lasts.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import ray

from raylm.actors.manager_actor import end, serve, served_models
from raylm.api import ServedModel
from raylm.chatbot import AsyncServedModel, LoopThread
from raylm.config import ModelConfig
from raylm.errors import InvalidRequestError, RaylmError
from raylm.messages import Completion, GenerationConfig, Request
from raylm.pool import Pool

try:
    import pyarrow as pa
except ImportError as error:
    raise ImportError("raylm.data needs Ray Data: pip install 'raylm[data]'") from error

OUTPUT_COLUMNS = {
    "text": pa.string(),
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int64(),
    "completion_tokens": pa.int64(),
    "slot": pa.int64(),
    "error_type": pa.string(),
    "error": pa.string(),
}
"""What `Generate` adds to a batch. A row that is answered has nulls in the last two, one that failed in all others."""

_PARAMETERS = GenerationConfig.__struct_fields__

_IDLE_S = 2.0
"""A worker that has had no batch for so long leaves the model, and joins it again for the next one."""


class Generate:
    """Answers the rows of a batch; a class for `Dataset.map_batches` with `batch_format="pyarrow"`.

    All rows of a batch are at the pool together, in its batch lane, the longest first. Ray Data gives a worker more
    batches while the first is being answered: four of a task, and `max_concurrent_calls_per_actor` tasks.

    When a worker dies, Ray Data computes its unfinished blocks again. Keep them small, some hundred rows: one that is
    beyond `DataContext.target_max_block_size` with its answers may lose rows then (docs/guides/ray-data.md).

    It returns the batch with `OUTPUT_COLUMNS` added. A row that is wrong, or that no actor could answer, has its error
    there, and a null for its text.

    Args:
        model: Name of a model that is served on the cluster, by `raylm serve` or by `serving`.
        prompt_column: Column of raw texts, to which no template is applied.
        messages_column: Column of conversations, lists of `role` and `content`. With both columns, a row has a null in
            one of them.
        parameter_columns: Columns named as the generation parameters that they hold. A null takes the default.
        prefix: Begin of the names of the added columns.
        sampling: Generation parameters (`raylm.messages.GenerationConfig`) of all rows.

    Raises:
        InvalidRequestError: an argument is wrong. From a call: the batch has not the columns, or has one of that name
            already.
        ModelNotFoundError: from a call: no model of that name is served on the cluster.
        EngineStartError: from a call: an engine does not start; the text says what to do.
    """

    def __init__(
        self,
        model: str,
        *,
        prompt_column: str | None = None,
        messages_column: str | None = None,
        parameter_columns: Sequence[str] = (),
        prefix: str = "",
        **sampling: Any,
    ) -> None:
        if prompt_column is None and messages_column is None:
            raise InvalidRequestError("name the column to answer: prompt_column or messages_column")
        if unknown := set(parameter_columns) - set(_PARAMETERS):
            raise InvalidRequestError(
                f"parameter_columns: unknown parameter {', '.join(sorted(unknown))}; generation parameters are "
                f"{', '.join(_PARAMETERS)}"
            )
        GenerationConfig().updated(sampling)  # a wrong one is every row's, and ends the job
        inputs = {"prompt": prompt_column, "messages": messages_column}
        self._inputs = {name: column for name, column in inputs.items() if column is not None}
        self._parameters = tuple(parameter_columns)
        self._prefix = prefix
        self._sampling = sampling
        self._model = model
        self._served: AsyncServedModel | None = None
        self._room = asyncio.Semaphore()  # for rows; of the pool that has been joined
        self._joining = asyncio.Lock()  # while the pool is joined or left
        self._num_calls = 0  # that are running
        self._idle_at = 0.0  # when there was none any more
        self._leaving: set[asyncio.Task[None]] = set()
        # The pool has a loop to itself: Ray Data's stands still for as long as nobody takes what it has finished.
        self._loop = LoopThread()

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """Return a batch with its answers."""
        if not isinstance(batch, pa.Table):
            raise InvalidRequestError("map_batches: give it batch_format='pyarrow', which keeps every value as it is")
        if not batch.num_rows:
            return batch  # what a shuffle leaves empty may have no columns
        rows = self._rows(batch)
        results = await asyncio.wrap_future(self._loop.submit(self._answer_all(rows)))
        cells = [_cells(result) for result in results]
        for name, kind in OUTPUT_COLUMNS.items():
            batch = batch.append_column(self._prefix + name, pa.array([row.get(name) for row in cells], kind))
        return batch

    def __del__(self) -> None:
        """Leave the model. Ray Data forgets a worker's `Generate` when its process ends in order."""
        loop: LoopThread | None = getattr(self, "_loop", None)
        if loop is not None and loop.running:
            loop.run(self._close())
            loop.close()

    def _rows(self, batch: pa.Table) -> list[dict[str, Any]]:
        wanted = {*self._inputs.values(), *self._parameters}
        if missing := wanted - set(batch.column_names):
            raise InvalidRequestError(
                f"the dataset has no column {', '.join(sorted(missing))}; it has {', '.join(batch.column_names)}"
            )
        if taken := {self._prefix + name for name in OUTPUT_COLUMNS} & set(batch.column_names):
            raise InvalidRequestError(
                f"the dataset has a column {', '.join(sorted(taken))} already; rename it, or give a prefix"
            )
        rows: list[dict[str, Any]] = batch.select(sorted(wanted)).to_pylist()
        return rows

    async def _answer_all(self, rows: Sequence[Mapping[str, Any]]) -> list[Completion | RaylmError]:
        async with self._joined() as served:
            requests = [self._request(served, row) for row in rows]
            longest_first = sorted(range(len(requests)), key=lambda index: _length(requests[index]), reverse=True)
            async with asyncio.TaskGroup() as group:
                tasks = {
                    index: group.create_task(self._answer(served.pool, requests[index])) for index in longest_first
                }
        return [tasks[index].result() for index in range(len(requests))]

    async def _answer(self, pool: Pool, request: Request | RaylmError) -> Completion | RaylmError:
        if isinstance(request, RaylmError):
            return request
        async with self._room:
            try:
                return await pool.generate(request, lane="batch")
            except RaylmError as error:
                return error

    def _request(self, served: AsyncServedModel, row: Mapping[str, Any]) -> Request | RaylmError:
        given = {name: row[column] for name, column in self._inputs.items() if row[column] is not None}
        if not given:
            return InvalidRequestError(f"{' and '.join(self._inputs.values())}: null; there is nothing to answer")
        if isinstance(messages := given.get("messages"), list):
            given["messages"] = [_without_nulls(message) for message in messages]
        own = {name: row[name] for name in self._parameters if row[name] is not None}
        try:
            return served.request(**given, **(self._sampling | own))
        except InvalidRequestError as error:
            return error

    @asynccontextmanager
    async def _joined(self) -> AsyncIterator[AsyncServedModel]:
        """Give the served model. It is left again when there has been nothing to do for a while.

        For a pool has calls in flight all the time, and Ray ends no worker that has: once the stage is done, it would
        stay for as long as the model.
        """
        self._num_calls += 1
        try:
            async with self._joining:
                if self._served is not None and not self._served.pool.can_work:
                    await self._leave()  # the model has been ended; it may be served again
                if self._served is None:
                    self._served = await AsyncServedModel(self._model).start()
                    # Ray Data bounds how many rows there are. Those beyond the queue's own limit wait outside of it.
                    self._room = asyncio.Semaphore(self._served.pool.config.max_queued or sys.maxsize)
            yield self._served
        finally:
            self._num_calls -= 1
            self._idle_at = asyncio.get_running_loop().time()
            task = asyncio.create_task(self._leave_when_idle(self._idle_at))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _leave_when_idle(self, idle_at: float) -> None:
        await asyncio.sleep(_IDLE_S)
        async with self._joining:
            if not self._num_calls and self._idle_at == idle_at:
                await self._leave()

    async def _leave(self) -> None:
        served, self._served = self._served, None
        if served is not None:
            await served.aclose()

    async def _close(self) -> None:
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await self._leave()


@contextmanager
def serving(config: ModelConfig) -> Iterator[str]:
    """Serve a model for as long as the block lasts, on the cluster that Ray Data uses; gives its name.

    Datasets are lazy: write them, or read them to their end, inside the block. A model that is served already with the
    same settings is used, and left as it is. When this process dies, its model ends some two minutes later.

    Args:
        config: The model. Jobs that run beside each other give theirs different names.

    Raises:
        InvalidRequestError: a model of that name is served with other settings.
        PlacementError: the actors do not fit.
        EngineStartError: an engine does not start; the text says what to do.
    """
    if not ray.is_initialized():
        ray.init()  # as Ray Data itself would, and for Ray Data: it goes on after the block
    loop = LoopThread()
    begun = config.name not in served_models()
    try:
        try:
            loop.run(serve(config))
            with ServedModel(config.name):  # a client that stays, because a model without any ends
                yield config.name
        finally:
            if begun:
                loop.run(end(config.name))
    finally:
        loop.close()


def _length(request: Request | RaylmError) -> int:
    return request.config.max_new_tokens if isinstance(request, Request) else 0


def _cells(result: Completion | RaylmError) -> dict[str, Any]:
    """Return the output columns of a row that are not null."""
    if isinstance(result, RaylmError):
        return {"error_type": type(result).__name__, "error": result.message}
    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.usage.prompt_tokens,
        "completion_tokens": result.usage.completion_tokens,
        "slot": result.receipt.slot,
    }


def _without_nulls(message: object) -> object:
    """Return a message without the keys that Arrow added because another message has them."""
    if isinstance(message, Mapping):
        return {key: value for key, value in message.items() if value is not None}
    return message
