"""Labels' codes: the user's, the standard's by name, or ours; always valid."""

from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.volumes.dicom.annotations.coding import PRIVATE_SCHEME, coding_of, dicom_text, read_codes


@pytest.mark.parametrize(
    ("name", "value", "side", "category", "roi_type"),
    [
        ("liver", "10200004", None, "91723000", "ORGAN"),
        ("Kidney_L", "64033007", "7771000", "91723000", "ORGAN"),
        ("right lung", "39607008", "24028007", "91723000", "ORGAN"),
        ("kidneys", "64033007", None, "91723000", "ORGAN"),
        ("inferiorVenaCava", "64131007", None, "91723000", "ORGAN"),
        ("Left Ventricle", "87878005", None, "91723000", "ORGAN"),
        ("tumour", "108369006", None, "49755003", ""),
        ("GTV_nodes", "108369006", None, "49755003", "GTV"),
        ("lesion", "52988006", None, "49755003", ""),
        ("hippocampus", "5366008", None, "91723000", "ORGAN"),
    ],
)
def test_codes_of_the_standard(name: str, value: str, side: str | None, category: str, roi_type: str) -> None:
    """SNOMED CT's own numbers, as CID 7192 and 7194 list them."""
    coding = coding_of(name)
    assert (coding.type.value, coding.type.scheme) == (value, "SCT")
    assert (coding.side.value if coding.side else None, coding.category.value) == (side, category)
    assert coding.roi_type == roi_type


@pytest.mark.parametrize("name", ["anterior", "L", "background", "normal", "GTVx", "x" * 90, "a\\b", "größte Läsion"])
def test_other_names_get_a_valid_code_of_our_own(name: str) -> None:
    concept = coding_of(name).type
    assert concept.scheme == PRIVATE_SCHEME
    assert 0 < len(concept.value) <= 16 and concept.value.isascii() and "\\" not in concept.value
    assert 0 < len(concept.meaning) <= 64 and "\\" not in concept.meaning


def test_names_that_differ_have_codes_that_differ() -> None:
    long = "a label of a name that is longer than a code"
    assert coding_of(f"{long} 1").type.value != coding_of(f"{long} 2").type.value


def test_a_table_of_the_user_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "codes.csv"
    path.write_text(
        "label,scheme,value,meaning,category,side,roi_type\n"
        "anterior,SCT,5366008,Hippocampus,anatomical structure,left,ORGAN\n"
        "liver,99MINE,L1,My liver,,,\n"
    )
    table = read_codes(path)
    own = coding_of("anterior", table)
    assert (own.type.value, own.side and own.side.meaning, own.roi_type) == ("5366008", "Left", "ORGAN")
    assert coding_of("liver", table).type.scheme == "99MINE"
    assert coding_of("spleen", table).type.value == "78961009"


def test_every_wrong_line_of_a_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "codes.csv"
    path.write_text(
        "label,scheme,value,meaning,side\n"
        "a,SCT,,Nothing,\n"
        "b,SCT,12345678901234567,Too long,\n"
        "c,SCT,1,Sided,middle\n"
        "d,SCT,1,Fine,left\n"
        "d,SCT,1,Twice,left\n"
    )
    with pytest.raises(PipelineError) as error:
        read_codes(path)
    lines = str(error.value).splitlines()
    assert [line.split(":")[1] for line in lines] == ["2", "3", "4", "6"]
    assert "value missing" in lines[0] and "16 characters" in lines[1] and "left, right" in lines[2]


@pytest.mark.parametrize("text", ["", "label,value\nliver,1\n", "label,scheme,value,meaning,colour\n"])
def test_a_table_of_other_columns_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "codes.csv"
    path.write_text(text)
    with pytest.raises(PipelineError, match="label,scheme,value,meaning"):
        read_codes(path)


def test_text_for_dicom() -> None:
    assert dicom_text(" a\\b\n c ") == "a/b c"
    assert dicom_text("   ") == "unnamed"
    assert dicom_text("x" * 70) == "x" * 64
