#!/usr/bin/env bash
# SQLAlchemy 2.1.9: sort() and reverse() of an ordering_list change no position and are lost at commit, unless an element is removed later.
#
# OrderingList numbers its elements anew in insert(), remove(), pop() and assignments, so that the order of the list is the order that is saved. sort() and
# reverse() are those of a plain list: the list looks sorted, nothing is dirty, and after commit() the old order is back. But a pop() in the same
# transaction numbers all elements as they stand, and then the sort is saved with it. reorder() after the sort does what one expects.
#
# Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet sqlalchemy==2.1.9
cat > "$folder/run.py" <<'PYTHON'
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.ext.orderinglist import ordering_list


class Base(orm.DeclarativeBase):
    pass


class Album(Base):
    __tablename__ = "album"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    songs: orm.Mapped[list["Song"]] = orm.relationship(order_by="Song.position", collection_class=ordering_list("position"))


class Song(Base):
    __tablename__ = "song"
    name: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    position: orm.Mapped[int]
    album: orm.Mapped[int | None] = orm.mapped_column(sa.ForeignKey("album.id"))


def saved_after(change):
    engine = sa.create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with orm.Session(engine) as session:
        album = Album(id=1)
        session.add(album)
        for name in "cabd":
            album.songs.append(Song(name=name))
        session.commit()
        change(album.songs)
        seen, dirty = "".join(song.name for song in album.songs), bool(session.dirty)
        session.commit()
        return seen, dirty, "".join(song.name for song in album.songs)


def name(song):
    return song.name


found = {
    "sort": saved_after(lambda songs: songs.sort(key=name)),
    "reverse": saved_after(lambda songs: songs.reverse()),
    "sort, pop": saved_after(lambda songs: (songs.sort(key=name), songs.pop())),
    "sort, reorder": saved_after(lambda songs: (songs.sort(key=name), songs.reorder())),
    "slice": saved_after(lambda songs: songs.__setitem__(slice(None), sorted(songs, key=name))),
}
print(f"SQLAlchemy {sa.__version__}, 'cabd': (seen, dirty, after commit) {found}")
assert found["sort"] == ("abcd", False, "cabd"), found
assert found["reverse"] == ("dbac", False, "cabd"), found
assert found["sort, pop"] == ("abc", True, "abc"), found
assert found["sort, reorder"] == ("abcd", True, "abcd"), found
assert found["slice"] == ("abcd", True, "abcd"), found
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
