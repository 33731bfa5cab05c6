"""Sessions in a Redis database. The only importer of `redis`.

A session is one hash, so that it expires, and is evicted, as a whole: `slot`, `turn` (the turn in progress) and `ends`
(when that times out, ms), `size` (turns in the transcript), each turn's messages, as msgpack, under the turn's number,
and `done:<turn>` for each. Every operation is one script, which Redis runs with nothing in between, and goes by the
server's clock. Scripts may run twice, when the reply to the first was lost.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from raylm.actors.sessions import SessionState
from raylm.config import SessionConfig
from raylm.errors import SessionBusyError, SessionError, SessionNotFoundError, SessionStoreError
from raylm.messages import Message

try:
    import redis.asyncio as redis
    from redis import exceptions
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
except ImportError as error:
    raise SessionError("sessions in Redis need its client: pip install 'raylm[redis]'") from error

_GIVE_UP_S = 5.0
"""How long an operation waits for a database that is down."""

_MIN_BACK_OFF_S = 0.05
_MAX_BACK_OFF_S = 0.5
"""Time between two attempts, which doubles from the one to the other."""

_MAX_CONNECTIONS = 64
"""More operations at a time wait for one of these."""

# KEYS[1] is the index of all sessions, a sorted set by the time at which they expire, and KEYS[2] the session.
_COMMON = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function busy(key)
    local turn = redis.call('HMGET', key, 'turn', 'ends')
    return turn[1] and tonumber(turn[2]) > now and turn[1]
end

local function keep(key, ms)
    redis.call('PEXPIRE', key, ms)
    redis.call('ZADD', KEYS[1], now + ms, key)
end

local function forget(key)
    redis.call('ZREM', KEYS[1], key)
    return redis.call('DEL', key)
end
"""

_CLAIM = """
local slot, turn, start, ttl_ms, turn_ms = unpack(ARGV)
local holder = busy(KEYS[2])
if holder ~= turn then
    if holder then return {'busy'} end
    if start == '1' then
        redis.call('DEL', KEYS[2])
        redis.call('HSET', KEYS[2], 'slot', slot, 'size', 0)
    end
end
if redis.call('EXISTS', KEYS[2]) == 0 then return {'missing'} end
redis.call('HSET', KEYS[2], 'turn', turn, 'ends', now + turn_ms)
keep(KEYS[2], math.max(ttl_ms, turn_ms))
return {'ok', redis.call('HGETALL', KEYS[2])}
"""

_APPEND = """
local slot, turn, messages, ttl_ms = unpack(ARGV)
local found = redis.call('HMGET', KEYS[2], 'turn', 'size')
if found[1] == turn then
    redis.call('HSET', KEYS[2], found[2], messages, 'size', found[2] + 1, 'slot', slot, 'done:' .. turn, 1)
    redis.call('HDEL', KEYS[2], 'turn', 'ends')
    keep(KEYS[2], tonumber(ttl_ms))
elseif redis.call('HEXISTS', KEYS[2], 'done:' .. turn) == 0 then
    return {'lost'}
end
return {'ok'}
"""

# KEYS[3] and so on are more sessions.
_RENEW = """
local ttl_ms, turn_ms = unpack(ARGV, 1, 2)
for number = 2, #KEYS do
    if redis.call('HGET', KEYS[number], 'turn') == ARGV[number + 1] then
        redis.call('HSET', KEYS[number], 'ends', now + turn_ms)
        keep(KEYS[number], math.max(ttl_ms, turn_ms))
    end
end
return {'ok'}
"""

_RELEASE = """
local turn, ttl_ms, ends = unpack(ARGV)
local found = redis.call('HMGET', KEYS[2], 'turn', 'size')
if found[1] == turn then
    if ends == '1' or found[2] == '0' then
        forget(KEYS[2])
    else
        redis.call('HDEL', KEYS[2], 'turn', 'ends')
        keep(KEYS[2], tonumber(ttl_ms))
    end
end
return {'ok'}
"""

_LOAD = """
if redis.call('EXISTS', KEYS[2]) == 0 then return {'missing'} end
return {'ok', redis.call('HGETALL', KEYS[2])}
"""

_END = """
if forget(KEYS[2]) == 0 then return {'missing'} end
return {'ok'}
"""

# KEYS[3] is the new session.
_FORK = """
if redis.call('EXISTS', KEYS[2]) == 0 then return {'missing'} end
if busy(KEYS[2]) or busy(KEYS[3]) then return {'busy'} end
if KEYS[2] ~= KEYS[3] then redis.call('COPY', KEYS[2], KEYS[3], 'REPLACE') end
redis.call('HDEL', KEYS[3], 'turn', 'ends')
keep(KEYS[3], tonumber(ARGV[1]))
return {'ok'}
"""

# KEYS[2] is a key of its own: the session has no transcript.
_PIN = """
local slot, moved_from, ttl_ms = unpack(ARGV)
local pinned = redis.call('GET', KEYS[2])
if not pinned or pinned == moved_from then pinned = slot end
redis.call('SET', KEYS[2], pinned)
keep(KEYS[2], tonumber(ttl_ms))
return {'ok', tonumber(pinned)}
"""

_COUNT = """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
return {'ok', redis.call('ZCARD', KEYS[1])}
"""


class RedisSessionStore:
    """Sessions in a Redis database, version 6.2 or newer, shared by all who name the same database and prefix.

    How much it holds is the database's business: set its `maxmemory`, with `maxmemory-policy volatile-lru`, and the
    least recently used sessions make room. `max_sessions` and `max_bytes` do nothing here. Whether sessions survive the
    end of the database's process is its business too (`appendonly yes`). A database that is down is tried for a few
    seconds, then SessionStoreError is raised; it is used again as soon as it is back.

    Args:
        url: The database, as in `SessionConfig`.
        config: How long sessions and turns last, and where the password is.
        prefix: Before the name of each key.

    Raises:
        SessionError: the url is wrong, or the variable of the password is not set in this process.
    """

    def __init__(self, url: str, config: SessionConfig, prefix: str) -> None:
        self._prefix = prefix
        self._ttl_ms = max(1, int(config.ttl_s * 1000))
        self._turn_ms = max(1, int(config.turn_timeout_s * 1000))
        password = None
        if config.password_env is not None and not (password := os.environ.get(config.password_env)):
            raise SessionError(
                f"the password of the session store is to be in the environment variable {config.password_env} "
                "(sessions.password_env), which is not set in this process; set it where Ray is started on each node, "
                "and where programs that use the model are"
            )
        try:
            connections = redis.BlockingConnectionPool.from_url(
                url,
                password=password,
                max_connections=_MAX_CONNECTIONS,
                timeout=_GIVE_UP_S,
                socket_connect_timeout=_GIVE_UP_S,
                socket_timeout=_GIVE_UP_S,
                retry=Retry(NoBackoff(), 0),  # `_run` tries again, and knows when to stop
            )
        except ValueError as error:
            raise SessionError(f"url of the session store: {error}") from error
        settings = connections.connection_kwargs
        self._address = f"{settings.get('host', 'localhost')}:{settings.get('port', 6379)}"  # without the password
        self._client = redis.Redis.from_pool(connections)
        self._decode = msgspec.msgpack.Decoder(tuple[Message, ...]).decode
        codes = (_CLAIM, _APPEND, _RENEW, _RELEASE, _LOAD, _END, _FORK, _PIN, _COUNT)
        self._scripts = {code: self._client.register_script(_COMMON + code) for code in codes}

    async def claim(self, session_id: str, slot: int, turn_id: str, *, start: bool) -> SessionState:
        """See `SessionStore.claim`."""
        fields = await self._run(_CLAIM, (session_id,), slot, turn_id, int(start), self._ttl_ms, self._turn_ms)
        return self._state(fields)

    async def append(self, session_id: str, turn_id: str, messages: Sequence[Message], slot: int) -> None:
        """See `SessionStore.append`."""
        blob = msgspec.msgpack.encode(messages)
        await self._run(_APPEND, (session_id,), slot, turn_id, blob, self._ttl_ms)

    async def renew(self, turns: Mapping[str, str]) -> None:
        """See `SessionStore.renew`."""
        await self._run(_RENEW, tuple(turns.values()), self._ttl_ms, self._turn_ms, *turns)

    async def release(self, session_id: str, turn_id: str, *, end: bool = False) -> None:
        """See `SessionStore.release`."""
        await self._run(_RELEASE, (session_id,), turn_id, self._ttl_ms, int(end))

    async def load(self, session_id: str) -> SessionState:
        """See `SessionStore.load`."""
        return self._state(await self._run(_LOAD, (session_id,)))

    async def end(self, session_id: str) -> None:
        """See `SessionStore.end`."""
        await self._run(_END, (session_id,))

    async def fork(self, session_id: str, new_session_id: str) -> None:
        """See `SessionStore.fork`."""
        await self._run(_FORK, (session_id, new_session_id), self._ttl_ms)

    async def pin(self, session_id: str, slot: int, *, moved_from: int | None = None) -> int:
        """See `SessionStore.pin`."""
        left = "" if moved_from is None else moved_from
        pinned: int = await self._run(_PIN, (session_id,), slot, left, self._ttl_ms, kind="pin")
        return pinned

    async def num_sessions(self) -> int:
        """See `SessionStore.num_sessions`. Sessions that the database has evicted count until they would have expired.

        It is the size of an index that every operation keeps up to date, and so costs the same for any number of them.
        """
        number: int = await self._run(_COUNT, ())
        return number

    async def aclose(self) -> None:
        """See `SessionStore.aclose`."""
        await self._client.aclose()

    def _state(self, fields: Sequence[bytes]) -> SessionState:
        found = dict(zip(fields[::2], fields[1::2], strict=True))
        turns = [self._decode(found[b"%d" % turn]) for turn in range(int(found[b"size"]))]
        return SessionState(int(found[b"slot"]), tuple(message for turn in turns for message in turn))

    async def _run(
        self, code: str, session_ids: Sequence[str], *arguments: str | bytes | int, kind: str = "session"
    ) -> Any:
        """Run a script and return its result, or raise what it found."""
        keys = [f"{self._prefix}sessions", *(f"{self._prefix}{kind}:{session_id}" for session_id in session_ids)]
        status, *result = await self._insist(self._scripts[code], keys, arguments)
        if status == b"busy":
            raise SessionBusyError(f"session {' or '.join(session_ids)} is in the middle of a turn; wait for its end")
        if status == b"missing":
            raise SessionNotFoundError(f"there is no session {session_ids[0]}; begin one with sequence_start=True")
        if status == b"lost":
            raise SessionNotFoundError(f"session {session_ids[0]} is no longer held by this turn; begin a new one")
        return result[0] if result else None

    async def _insist(self, script: Any, keys: Sequence[str], arguments: Sequence[str | bytes | int]) -> Any:
        """Run a script, on a new connection if need be."""
        back_off_s = _MIN_BACK_OFF_S
        cause: Exception = TimeoutError(f"no reply within {_GIVE_UP_S:g} s")
        try:
            async with asyncio.timeout(_GIVE_UP_S):
                while True:
                    try:
                        return await script(keys, arguments)
                    except exceptions.AuthenticationError:
                        raise
                    except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
                        cause = error
                    await asyncio.sleep(back_off_s)
                    back_off_s = min(2 * back_off_s, _MAX_BACK_OFF_S)
        except TimeoutError:
            raise SessionStoreError(
                f"the session store at {self._address} cannot be reached: {cause}", retry_after_s=_GIVE_UP_S
            ) from cause
        except exceptions.RedisError as error:
            raise SessionStoreError(f"the session store at {self._address} refuses: {error}") from error
