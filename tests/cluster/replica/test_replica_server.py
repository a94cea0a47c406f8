"""A replica's server against false, noisy and slow peers."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from shoal.cluster.replica.replica_server import ServerOptions
from shoal.cluster.router.options import RouterOptions
from shoal.cluster.router.router import Router
from shoal.cluster.wire.errors import HandshakeError, WireError
from shoal.cluster.wire.frames import VERSION, Challenge, Connection, Hello, Proof, Submit, SubmitItem, decode
from shoal.cluster.wire.handshake import prove_as_router
from shoal.cluster.wire.membership import ReplicaInfo, StaticMembership
from shoal.replicas.channel.handshake import new_secret
from shoal.replicas.errors import EngineError, PromptTooLong
from shoal.replicas.protocol import FinishReason, Request, TokenDelta
from tests.support.cluster import cluster, collect, eventually, in_loop, request, tokens
from tests.support.fake_replica import FakeReplica, fake_output


async def connect(info: ReplicaInfo) -> Connection:
    connection = Connection()
    await asyncio.get_running_loop().create_connection(lambda: connection, info.host, info.port)
    return connection


def hello(info: ReplicaInfo, **changes: object) -> Hello:
    fields = {
        "version": VERSION,
        "router_id": "x",
        "replica_id": info.replica_id,
        "epoch": info.epoch,
        "host": info.host,
        "port": info.port,
        "nonce": bytes(32),
    }
    return Hello(**{**fields, **changes})  # pyright: ignore[reportArgumentType]


@in_loop
async def test_a_router_without_the_secret_is_refused() -> None:
    async with FakeReplica(new_secret()) as replica:
        connection = await connect(replica.info)
        with pytest.raises(HandshakeError, match="is not replica fake-0 of this cluster"):
            await prove_as_router(connection, new_secret(), "intruder", replica.info)
        connection.cut()

        # One that does not mind the replica's wrong proof still has none of its own.
        connection = await connect(replica.info)
        connection.send(hello(replica.info))
        decode(await connection.next_frame(), Challenge)
        connection.send(Proof(bytes(32)))
        with pytest.raises(WireError):
            await connection.next_frame()
        assert replica.server._sessions == set()


@in_loop
async def test_a_router_with_another_secret_serves_nothing() -> None:
    async with FakeReplica(new_secret()) as replica:
        router = Router(StaticMembership([replica.info]), new_secret())
        await router.start()
        assert router.replicas("fake") == []
        await router.close()


@pytest.mark.parametrize(
    "lie", [{"replica_id": "fake-9"}, {"epoch": 1}, {"port": 1}, {"host": "10.0.0.1"}, {"version": 99}, {"nonce": b""}]
)
@in_loop
async def test_a_hello_meant_for_another_replica_is_refused(lie: dict[str, object]) -> None:
    async with FakeReplica(new_secret()) as replica:
        connection = await connect(replica.info)
        connection.send(hello(replica.info, **lie))
        with pytest.raises(WireError):
            await connection.next_frame()


@in_loop
async def test_proofs_of_one_connection_do_not_open_another() -> None:
    secret = new_secret()
    async with FakeReplica(secret) as replica:
        recorded: list[object] = []

        class Recorder(Connection):
            def send(self, message: object) -> None:
                recorded.append(message)
                super().send(message)

        connection = Recorder()
        await asyncio.get_running_loop().create_connection(lambda: connection, replica.info.host, replica.info.port)
        await prove_as_router(connection, secret, "honest", replica.info)
        assert [type(message) for message in recorded] == [Hello, Proof]

        thief = await connect(replica.info)
        thief.send(recorded[0])
        await thief.next_frame()
        thief.send(recorded[1])
        with pytest.raises(WireError):
            await thief.next_frame()
        connection.cut()


@in_loop
async def test_a_replica_that_only_listens_at_the_address_is_not_believed() -> None:
    secret = new_secret()
    async with FakeReplica(secret) as replica:
        elsewhere = replace(replica.info, replica_id="fake-1")
        connection = await connect(replica.info)
        with pytest.raises(WireError):
            await prove_as_router(connection, secret, "router", elsewhere)


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x05hello", b"\xff" * 64, b""])
@in_loop
async def test_noise_before_the_handshake_closes_only_its_own_connection(noise: bytes) -> None:
    async with cluster() as c:
        reader, writer = await asyncio.open_connection(c.replicas[0].info.host, c.replicas[0].info.port)
        writer.write(noise)
        writer.write_eof()
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
        (deltas,) = await c.run(c.generate(request()))
        assert tokens(deltas) == fake_output(request())


@in_loop
async def test_frames_before_the_handshake_are_few() -> None:
    async with FakeReplica(new_secret()) as replica:
        connection = await connect(replica.info)
        connection.send(hello(replica.info))
        for _ in range(20):
            connection.send(Proof(bytes(32)))
        await eventually(lambda: connection.closed)
        assert replica.server._sessions == set()


@in_loop
async def test_an_unproved_connection_does_not_stay() -> None:
    async with FakeReplica(new_secret(), server_options=ServerOptions(handshake_timeout=0.05)) as replica:
        reader, writer = await asyncio.open_connection(replica.info.host, replica.info.port)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


@in_loop
async def test_noise_after_the_handshake_aborts_only_that_routers_requests() -> None:
    async with cluster() as c:
        info = c.replicas[0].info
        connection = await connect(info)
        await prove_as_router(connection, c.secret, "noisy", info)
        connection.send(Submit([SubmitItem(1, request("noisy", max_tokens=100))]))
        task = c.generate(request("quiet"))
        await eventually(lambda: c.running() == [2])
        connection.send(["no", "message"])
        await eventually(lambda: c.replicas[0].engine.aborted == ["noisy"])
        (deltas,) = await c.run(task)
        assert tokens(deltas) == fake_output(request())


@in_loop
async def test_a_router_that_does_not_read_is_cut_and_the_others_go_on() -> None:
    async with cluster(server_options=ServerOptions(send_limit=100_000), max_model_len=10**7) as c:
        replica = c.replicas[0]
        deaf = await connect(replica.info)
        await prove_as_router(deaf, c.secret, "deaf", replica.info)
        deaf.send(Submit([SubmitItem(1, request("deaf", max_tokens=10**6))]))
        task = c.generate(request(max_tokens=3))
        await eventually(lambda: c.running() == [2])
        assert deaf._transport is not None
        deaf._transport.pause_reading()
        while not replica.engine.aborted:
            replica.server.publish([TokenDelta("deaf", 0, tuple(range(10_000)))])
            await asyncio.sleep(0)
        assert replica.engine.aborted == ["deaf"]
        (deltas,) = await c.run(task)
        assert tokens(deltas) == fake_output(request(max_tokens=3))
        deaf.cut()


@in_loop
async def test_a_failed_engine_cuts_its_routers_off_and_they_go_elsewhere() -> None:
    async with cluster(2) as c:
        task = c.generate(request(max_tokens=20))
        await eventually(lambda: sum(c.running()) == 1)
        failed = c.running().index(1)
        c.step()
        c.replicas[failed].server.fail(RuntimeError("out of memory"))
        (deltas,) = await c.run(task)
        assert tokens(deltas) == fake_output(request(max_tokens=20))
        assert all(delta.error is None for delta in deltas)


@in_loop
async def test_a_request_comes_back_while_its_first_life_is_being_aborted() -> None:
    async with cluster(options=RouterOptions(reconnect_delay=0.01)) as c:
        (replica,) = c.replicas
        stream = c.router.generate("fake", request())
        first = asyncio.ensure_future(anext(stream))
        await eventually(lambda: c.running() == [1])
        c.step()
        seen = await first
        (session,) = replica.server._sessions
        session.connection.cut()  # the replica lives, but the router cannot know
        await eventually(lambda: len(replica.engine.requests) == 2)  # no step since: the abort is not through

        async def rest() -> list[TokenDelta]:
            return seen + [delta async for deltas in stream for delta in deltas]

        (deltas,) = await c.run(asyncio.ensure_future(rest()))
        assert tokens(deltas) == fake_output(request())
        assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [FinishReason.LENGTH]
        await replica.server.drained()


@in_loop
async def test_room_reserved_for_a_refused_request_is_given_back() -> None:
    options = ServerOptions(load_interval=0.01)
    async with cluster(server_options=options, num_blocks=4, max_model_len=64) as c:
        (session,) = c.replicas[0].server._sessions
        await eventually(lambda: session.reported_load is not None)
        await c.router.block_reports("fake")  # the load has arrived before this answer, and no other is due
        with pytest.raises(PromptTooLong):
            await c.generate(request("large", prompt=(1,) * 60))
        task = c.generate(request("small"))
        await eventually(lambda: c.running() == [1])
        (deltas,) = await c.run(task)
        assert tokens(deltas) == fake_output(request("small"))


@in_loop
async def test_an_engine_that_has_stopped_sends_its_requests_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(2) as c:

        def stopped(request: Request) -> None:
            raise EngineError("the engine has stopped and takes no requests")

        monkeypatch.setattr(c.replicas[0].engine, "submit", stopped)
        (deltas,) = await c.run(c.generate(request()))
        assert tokens(deltas) == fake_output(request())


@in_loop
async def test_a_restarted_replica_is_another_one() -> None:
    async with cluster(options=RouterOptions(reconnect_delay=0.01)) as c:
        (old,) = c.replicas
        await old.close()
        new = FakeReplica(c.secret, replica_id=old.info.replica_id)
        async with new:
            assert new.info.epoch != old.info.epoch
            c.source.set([new.info])
            task = asyncio.create_task(collect(c.router, request()))
            await eventually(lambda: new.engine.load().num_running)
            while not task.done():
                new.engine.step()
                await asyncio.sleep(0)
            assert tokens(task.result()) == fake_output(request())
            assert [info for info, _ in c.router.replicas("fake")] == [new.info]
