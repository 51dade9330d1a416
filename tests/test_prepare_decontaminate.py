"""Which texts are leaks of benchmark questions: those that hold the question, not what the question is about."""

# ruff: noqa: RUF001 - Chinese punctuation is part of the subject

import json

import pyarrow as pa
import pytest

pytest.importorskip("numba")

from llmjax.prepare import decontaminate


def is_leak(text, question):
    index = decontaminate.index({"quiz": [decontaminate.Item("1", {"question": question})]})
    table = decontaminate.overlaps(pa.array([text], pa.large_string()), index)
    return decontaminate.leaked(table).tolist() == [0]


CAPITAL = "What is the capital of the state of New York?"
ARMS = "The right of the people to keep and bear arms shall not be infringed is in which amendment?"
TRUTHS = "We hold these truths to be self-evident, that all men are created equal. Who wrote this?"
CHINA = "中华人民共和国的首都是哪里？"
WAR = "第二次世界大战结束的时间是？"


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("Albany is the capital of the state of New York and the seat of Albany County.", CAPITAL),
        ("A well regulated Militia, being necessary to the security of a free State, the right of the people to keep and "
         "bear Arms, shall not be infringed. The text has been debated for two centuries.", ARMS),
        ("When in the Course of human events ... We hold these truths to be self-evident, that all men are created equal, "
         "that they are endowed by their Creator with certain unalienable Rights.", TRUTHS),
        ("中华人民共和国的经济在过去四十年里增长迅速，人民的生活水平有了很大提高，城市化的速度也很快。", CHINA),
        ("他在第二次世界大战结束的那年出生，后来成为一名医生，在上海工作了三十年。", WAR),
        ("Albany is the capital of the state of New York and the seat of Albany County.", "Name the capital of the state of New York."),
        ("The capital of the state of New York is Albany.", "The capital of the state of New York is ____."),
        ("Every child learns that the mitochondria is the powerhouse of the cell.", "The mitochondria is the powerhouse of the cell."),
        ("A well regulated Militia being necessary, the right of the people to keep and bear Arms, shall not be infringed.",
         "The right of the people to keep and bear arms shall not be infringed is in the ____ amendment of the constitution."),
        ("Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty.",
         "Four score and seven years ago our fathers brought forth on this continent a new nation: whose speech begins so?"),
        ("Er sagte: Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft begabt.",
         "Alle Menschen sind frei und gleich an Würde und Rechten geboren: In welchem Dokument steht das und wer schrieb es?"),
        ("中国共产党的根本宗旨是全心全意为人民服务，这是党章的规定。", "中国共产党的根本宗旨是什么？"),
        ("床前明月光，疑是地上霜。举头望明月，低头思故乡。", "“床前明月光，疑是地上霜”这句诗的作者是谁？"),
        ("中华人民共和国的首都是北京，人口两千万。", "中华人民共和国的首都是____。"),
        ("日本国憲法は、戦争の放棄を定めている。国民の間に広く知られている。", "日本国憲法は、戦争の放棄をどの条文で定めていますか？"),
        ("ประเทศไทยมีกรุงเทพมหานครเป็นเมืองหลวง และมีประชากรมาก", "กรุงเทพมหานครเป็นเมืองหลวงของประเทศใด?"),
    ],
)  # fmt: skip
def test_a_text_about_what_a_question_is_about_is_no_leak(text, question):
    assert not is_leak(text, question)


@pytest.mark.parametrize("question", [CAPITAL, ARMS, TRUTHS, CHINA, WAR])
def test_the_same_questions_are_leaks_where_they_are_asked(question):
    assert is_leak(f"Some text before it. {question} And after.", question)


def test_the_right_choice_alone_is_a_fact_and_no_leak(tmp_path):
    law = "The right of the people to keep and bear arms shall not be infringed"
    row = {"question": "Which of these is a law of the land?", "choices": ["Nobody knows.", law], "answer": 1}
    (tmp_path / "quiz.jsonl").write_text(json.dumps(row))
    index = decontaminate.index({"quiz": decontaminate.read_benchmark(tmp_path / "quiz.jsonl")})
    texts = pa.array([f"It says that {law.lower()}, at last.", f"{row['question']} {law}"], pa.large_string())
    assert decontaminate.leaked(decontaminate.overlaps(texts, index)).tolist() == [1]


def test_a_passage_that_asks_nothing_is_a_leak_where_much_of_it_is():
    words = [f"word{n}" for n in range(60)]
    assert is_leak(" ".join(words[5:35]), " ".join(words))
    assert not is_leak(" ".join(words[5:20]), " ".join(words))


def test_an_edited_question_is_a_leak_though_the_word_that_asks_was_changed():
    question = (
        "An astronomer observes that a planet rotates faster after a meteorite impact. Which is the likely effect?"
    )
    assert is_leak(question.replace("Which", "What"), question)


def test_characters_of_unspaced_scripts_count_double_and_have_no_blanks_between_them():
    question = "这个城市的居民每天早上都在河边的公园里跑步吗"
    index = decontaminate.index({"quiz": [decontaminate.Item("1", {"question": question})]})
    [row] = decontaminate.overlaps(pa.array([f"。{question}。"], pa.large_string()), index).to_pylist()
    assert row["share"] == 1 and row["characters"] == 2 * len(question) - 1
