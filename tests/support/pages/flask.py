"""For docs/flask.md."""

import tempfile

import sqlalchemy as sa

from tests.support.pages.trains import Base, Train

REPLACED = {"postgresql+psycopg://…": f"sqlite:///{tempfile.mkdtemp(prefix='page-')}/trains.sqlite"}


class Booking(Base):
    """A row beside a train."""

    __tablename__ = "bookings"

    id = sa.Column(sa.Integer, primary_key=True)
    train = sa.Column(sa.String)
    seat = sa.Column(sa.Integer)
    passenger = sa.Column(sa.String)


def check(page):
    app = page["create_app"]()
    with app.app_context():
        session, engine = page["db"].session, page["db"].engine
        Base.metadata.create_all(engine)
        session.add(Train(name="ICE 1", seats={}))
        session.commit()
        session.remove()
        answer = app.test_client().post("/trains/ICE 1/seats/12", json={"passenger": "Ann"})
        assert answer.json == {"seat": 12}
        assert session.scalars(sa.select(Booking.passenger)).all() == ["Ann"]
        session.remove()
        engine.dispose()
