"""Published answers for what the protocol is made of, through our own functions where there are some."""

import hashlib
import hmac

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from isthmus.secagg.context import PROTOCOL
from isthmus.secagg.decoding import decode
from isthmus.secagg.derivation import Mask, agree, derive, is_signed, public_key, require_public_key
from isthmus.secagg.masks import add_masks
from isthmus.secagg.parameters import threshold_of
from isthmus.secagg.shamir import PRIME, secret_from, values_at, weights_at_zero

WIKIPEDIA = {1: 1494, 2: 329, 3: 965, 4: 176, 5: 1188, 6: 775}  # 1234 + 166x + 94x^2 modulo 1613


def test_x25519_agrees_as_in_rfc_7748() -> None:
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    assert public_key(alice).hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert public_key(bob).hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    for mine, theirs in ((alice, bob), (bob, alice)):
        agreed = agree(X25519PrivateKey.from_private_bytes(mine), public_key(theirs))
        assert agreed.hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"


def test_x25519_iterated_as_in_rfc_7748() -> None:
    scalar = point = bytes([9]) + bytes(31)
    for iteration in range(1, 1001):
        scalar, point = agree(X25519PrivateKey.from_private_bytes(scalar), point), scalar
        if iteration == 1:
            assert scalar.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert scalar.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


@pytest.mark.parametrize(
    "point",
    [
        0,
        1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
        2**255 - 20,
    ],
)
def test_points_of_low_order_are_no_public_keys(point: int) -> None:
    raw = point.to_bytes(32, "little")
    with pytest.raises(ValueError, match="low order"):
        require_public_key(raw)
    with pytest.raises(ValueError, match="low order"):
        agree(X25519PrivateKey.generate(), raw)


def test_a_public_key_has_one_form_only() -> None:
    require_public_key(public_key(bytes(range(32))))
    for other in (2**255 - 19, 2**255 - 10, 2**256 - 1):
        with pytest.raises(ValueError, match="canonical"):
            require_public_key(other.to_bytes(32, "little"))


def test_ed25519_signs_as_in_rfc_8032() -> None:
    key = Ed25519PrivateKey.from_private_bytes(
        bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    )
    identity = key.public_key().public_bytes_raw()
    assert identity.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    signature = key.sign(b"")
    assert signature.hex() == (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )
    assert is_signed(identity, signature, b"")
    assert not is_signed(identity, signature, b"x")
    assert not is_signed(bytes(31), signature, b"")


def test_hkdf_as_in_rfc_5869_and_ours_is_it_under_our_salt() -> None:
    found = HKDF(SHA256(), 42, bytes(range(13)), bytes(range(0xF0, 0xFA))).derive(b"\x0b" * 22)
    assert found.hex() == ("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865")
    # By hand: extract, then one block of expand.
    extracted = hmac.digest(PROTOCOL, b"secret", hashlib.sha256)
    assert derive(b"secret", b"info") == hmac.digest(extracted, b"info\x01", hashlib.sha256)


def test_masks_are_aes_256_in_counter_mode() -> None:
    """NIST SP 800-38A F.5.5 for the cipher; and a mask's words are that stream from counter 0."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    stream = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
    block = stream.update(bytes.fromhex("6bc1bee22e409f96e93d7e117393172a"))
    assert block.hex() == "601ec313775789a5b7a7f504bbf3d228"
    ecb = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    expected = b"".join(ecb.update(number.to_bytes(16, "big")) for number in range(3))
    words = np.zeros(12, np.uint32)
    add_masks(words, 0, [Mask(key, 1)])
    assert words.tolist() == [int.from_bytes(expected[at : at + 4], "little") for at in range(0, 48, 4)]
    # The very block of the publication, at the coordinate that its counter stands for.
    there = np.zeros(4, np.uint32)
    add_masks(there, int.from_bytes(counter, "big") * 4, [Mask(key, 1)])
    plain = np.frombuffer(bytes.fromhex("6bc1bee22e409f96e93d7e117393172a"), "<u4")
    assert (there ^ plain).astype("<u4").tobytes().hex() == "601ec313775789a5b7a7f504bbf3d228"


def test_aes_256_gcm_as_in_its_test_case_14() -> None:
    found = AESGCM(bytes(32)).encrypt(bytes(12), bytes(16), None)
    assert found.hex() == "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"


def test_sharing_gives_the_published_shares_and_any_three_give_the_secret() -> None:
    assert dict(zip(WIKIPEDIA, values_at([1234, 166, 94], WIKIPEDIA, 1613), strict=True)) == WIKIPEDIA
    for xs in [(2, 4, 5), (1, 2, 3), (6, 1, 4)]:
        assert secret_from(xs, [WIKIPEDIA[x] for x in xs], 1613) == 1234
    assert secret_from((1, 2), [1494, 329], 1613) != 1234
    assert decode(WIKIPEDIA, 3, 1613) == [1234, 166, 94]
    assert decode(WIKIPEDIA | {2: 5}, 3, 1613) == [1234, 166, 94]  # three to spare: one wrong share does no harm
    assert decode(WIKIPEDIA | {2: 5, 6: 5}, 3, 1613) is None


@pytest.mark.parametrize("xs", [(1, 2, 1), (0, 1), (1, PRIME + 1), (PRIME, 1)])
def test_shares_are_of_different_places_and_none_is_the_secret(xs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="different places"):
        weights_at_zero(xs)


def test_the_field_is_the_first_above_all_secrets() -> None:
    def prime(number: int) -> bool:
        """Miller and Rabin, to 40 bases."""
        odd, twos = number - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in range(2, 42):
            power = pow(base, odd, number)
            if power in (1, number - 1):
                continue
            for _ in range(twos - 1):
                power = power * power % number
                if power == number - 1:
                    break
            else:
                return False
        return True

    assert prime(PRIME)
    assert not any(prime(number) for number in range(2**256 + 1, PRIME, 2))


def test_more_than_two_thirds_have_to_stay() -> None:
    expected = {3: 3, 4: 3, 5: 4, 6: 5, 10: 7, 20: 14, 50: 34, 100: 67, 200: 134, 512: 342}
    assert {members: threshold_of(members) for members in expected} == expected
    assert threshold_of(1) == threshold_of(2) == 2
    with pytest.raises(ValueError, match="members"):
        threshold_of(0)
