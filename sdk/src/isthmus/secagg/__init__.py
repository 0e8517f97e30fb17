"""The protocol of secure aggregation: the service learns the sum of the members' vectors and nothing else. No I/O.

It is SecAgg (Bonawitz et al. 2017, https://eprint.iacr.org/2017/281) against a service that may cheat, with the
neighbours of a member as a parameter (Bell et al. 2020, https://eprint.iacr.org/2020/704).

Each member adds to its vector one mask of its own and, with every other member, one that both can make and that
cancels in the sum: the one adds it, the other takes it off. Five steps bring that about:

    keys       fresh public keys, signed with the organization's identity
    shares     shares of the secrets behind the masks, encrypted for each of the others
    update     the masked vector; the answer says whose vectors are in the sum
    survivors  each signs that one set, so that nobody can be shown another
    unmask     for who is in the sum, a share of its own mask; for who left, a share of its key of the pairs' masks

`client` has a member's side of them and `server` the service's. Both are functions from bytes to bytes: a client's
raise `ProtocolViolation` where the service cheats, a server's raise `MessageInvalid` where a member sends nonsense.
Numbers in messages are big-endian, the words of masks and vectors little-endian. Only `masks` knows arrays.
"""
