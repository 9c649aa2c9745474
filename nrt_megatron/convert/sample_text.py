"""Text on which `--verify` compares two models: prose, numbers, code and other scripts, so that many tokens occur."""

# Lewis Carroll, Alice's Adventures in Wonderland (1865), public domain.
SAMPLE_TEXT = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or \
twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and what \
is the use of a book," thought Alice, "without pictures or conversations?" So she was considering in her own mind \
(as well as she could, for the hot day made her feel very sleepy and stupid), whether the pleasure of making a \
daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly a White Rabbit with pink \
eyes ran close by her.

Question: A train leaves at 9:40 and arrives at 13:05. How long is the journey?
Answer: 3 hours and 25 minutes, that is 205 minutes or 12,300 seconds (3.4167 h).

def fibonacci(n: int) -> int:
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a  # fibonacci(10) == 55

Größe, naïve café, señor; Привет, мир; 你好,世界; こんにちは; x² + y² ≤ r², ∑ᵢ aᵢ → ∞.
"""
