"""A masked update on its way: admission, upload, receipt, and what is written down of them."""

from isthmus.client import Refused
from isthmus.wire.privacy import NoisePlace
from isthmus.wire.rounds import TaskOffer, UpdateReceipt
from isthmus_worker.journal import Journal, Release, ReleaseState
from isthmus_worker.release import LATER, PASSING, HandedIn, PlainBooks, known, state_of
from isthmus_worker.secured.records import SessionKey


def charged_at_the_end(offer: TaskOffer) -> bool:
    """Whether a masked update alone tells nothing that is charged: its noise is spread over all that are in the sum."""
    return offer.spec.privacy.where is NoisePlace.DISTRIBUTED


class MaskedBooks(PlainBooks):
    """The books of one vector, masked for one attempt.

    The spend is recorded at the first admission of a masked update of the vector, whatever the attempt; under
    `where: distributed` not before shares are revealed. Until then the vector counts as spent all the same, as does
    whatever may have been admitted unheard: others may reveal their shares of a sum that it is in. No answer changes
    that once masked bytes may have left, not even one that says that they came to nothing. No refusal discards a
    vector, which another attempt of the round needs.
    """

    def __init__(self, journal: Journal, release: Release, key: SessionKey, *, at_the_end: bool) -> None:
        super().__init__(journal, release)
        self._key = key
        self._at_the_end = at_the_end
        self._may_have_left = False
        """In this conversation. Those of earlier ones have left `unanswered` set, which nothing clears."""

    def asking(self) -> None:
        """Nothing of these bytes may have been heard of before that."""
        super().asking()
        self.journal.sessions.note_asking(self._key)

    def admitted(self) -> None:
        """Record the spend, once a release; or leave it counted as unheard, whatever is answered from now on."""
        if self._at_the_end:
            self._may_have_left = True
        else:
            super().admitted()

    def answered(self, refusal: Refused) -> None:
        """Nothing was admitted, unless masked bytes may be on their way, or were asked for unheard."""
        if not self._may_have_left:
            super().answered(refusal)

    def refused(self, refusal: Refused) -> HandedIn:
        """KEPT: the next offer of this attempt gets the same bytes. DISCARDED: this attempt is over for us."""
        return HandedIn.KEPT if known(refusal) in LATER | PASSING else HandedIn.DISCARDED

    def received(self, receipt: UpdateReceipt) -> None:
        """Keep the receipt with the attempt, and with the release unless it has one."""
        self.admitted()
        if state_of(self.journal, self.release) is ReleaseState.RELEASED:
            self.journal.mark_acknowledged(self.release, receipt)
        self.journal.sessions.keep_receipt(self._key, receipt.model_dump_json())


def charge_before_revealing(journal: Journal, release: Release, receipt: UpdateReceipt) -> None:
    """Record the spend of `where: distributed`, once a release, and keep the receipt of the masked update with it."""
    if state_of(journal, release) is ReleaseState.PREPARED:
        journal.mark_released(release)
    if state_of(journal, release) is ReleaseState.RELEASED:
        journal.mark_acknowledged(release, receipt)
