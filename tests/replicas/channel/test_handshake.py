"""A proof is valid for its secret, transcript, direction and wire only."""

from __future__ import annotations

import pytest

from shoal.replicas.channel.handshake import NONCE_BYTES, PROOF_BYTES, Handshake, Role, new_secret

SECRET, SAID = new_secret(), b"everything said so far"
PAIRS = [(Role.ROUTER, Role.REPLICA), (Role.ENGINE, Role.SHARD)]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_both_ends_prove_themselves(one: Role, other: Role) -> None:
    first, second = Handshake(one, SECRET), Handshake(other, SECRET)
    assert len(first.nonce) == len(second.nonce) == NONCE_BYTES
    assert first.nonce != second.nonce
    assert len(first.prove(SAID)) == PROOF_BYTES
    assert first.peer_proved(SAID, second.prove(SAID))
    assert second.peer_proved(SAID, first.prove(SAID))


@pytest.mark.parametrize("role", Role)
def test_a_proof_is_valid_for_the_peer_role_alone(role: Role) -> None:
    end = Handshake(role, SECRET)
    accepted = {sender for sender in Role if end.peer_proved(SAID, Handshake(sender, SECRET).prove(SAID))}
    (pair,) = [pair for pair in PAIRS if role in pair]
    assert accepted == set(pair) - {role}  # neither its own proof sent back, nor one of the other wire


def test_another_secret_transcript_or_length_is_refused() -> None:
    router, replica = Handshake(Role.ROUTER, SECRET), Handshake(Role.REPLICA, SECRET)
    assert not router.peer_proved(SAID, Handshake(Role.REPLICA, new_secret()).prove(SAID))
    assert not router.peer_proved(SAID + b"!", replica.prove(SAID))
    for proof in (b"", replica.prove(SAID)[:-1], replica.prove(SAID) + b"\0"):
        assert not router.peer_proved(SAID, proof)


def test_no_label_is_a_prefix_of_another() -> None:
    labels = [role.value for role in Role]
    assert not [(a, b) for a in labels for b in labels if a != b and b.startswith(a)]
