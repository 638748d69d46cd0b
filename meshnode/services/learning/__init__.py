"""Learning together: rounds of training on this device's samples, mixed with what others have learned.

    lessons    which lesson is followed, and the suite that it names
    worker     the trainer: jobs on this device's samples, judging on the suite
    rhythm     when the next round is trained, where the lesson leaves that to the device
    exchange   what goes out and comes in: deltas, their records, and what is refused
    cohort     one round's masked cohort: its mean instead of our adapter
    mixing     how what came in changes our adapter
    book       what of it is on the disk
    course     one lesson: the round machine (protocols/round), its orders carried out
    report     what `status` says
    service    follows the lessons

Only `service`, `lessons` and `report` are imported by a node that learns nothing: the rest brings numpy.
"""
