"""Accounts in DynamoDB, with boto3. The kind: compare and set, by a condition on the version."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from geventbatch import Conflict, NotSaved
from geventbatch.scopes import OnServer

_SERVERS_FAULT: Final = 500


@dataclass
class Account:
    """What operations get."""

    balance: int

    def add(self, amount: int) -> int:
        """Add *amount*, and return what there is then."""
        self.balance += amount
        return self.balance


class Accounts:
    """A store: ``Processor(open_resource=Accounts("accounts", max_batches=…), max_batches=…, …)``.

    Args:
        table: Its name; its partition key is a text, ``name``.
        max_batches: The processor's: so many connections there are.
        options: For `boto3.client`: ``region_name``, ``endpoint_url``, …
    """

    on_server = True

    def __init__(self, table: str, *, max_batches: int, **options: Any) -> None:
        # Sent again after a lost answer, a conditional write would be refused because of itself: no retries.
        settings = Config(retries={"total_max_attempts": 1}, max_pool_connections=max_batches)
        self._client = boto3.client("dynamodb", config=settings, **options)
        self._table = table

    @contextmanager
    def __call__(self, name: str) -> Iterator[Account]:
        """Load the account; at the end of the block, save it unless somebody else has changed it."""
        key = {"name": {"S": name}}
        item = self._client.get_item(TableName=self._table, Key=key, ConsistentRead=True).get("Item")
        version = int(item["version"]["N"]) if item else 0
        account = Account(int(item["balance"]["N"]) if item else 0)
        yield account
        condition: dict[str, Any] = {"ConditionExpression": "attribute_not_exists(version)"}
        if item:
            condition = {
                "ConditionExpression": "version = :loaded",
                "ExpressionAttributeValues": {":loaded": {"N": str(version)}},
            }
        changed = {**key, "balance": {"N": str(account.balance)}, "version": {"N": str(version + 1)}}
        try:
            self._client.put_item(TableName=self._table, Item=changed, **condition)
        except self._client.exceptions.ConditionalCheckFailedException as error:
            raise Conflict(f"{name} was not saved: somebody else has changed it meanwhile") from error
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] < _SERVERS_FAULT:  # throttled, say
                raise NotSaved(f"{name} was not saved: DynamoDB has refused it") from error
            raise  # nobody can tell whether it is saved, nor if the answer was lost


_: type[OnServer] = Accounts  # a type checker compares the store with what it says it has
