#!/usr/bin/env bash
# boto3 1.44.8: a conditional write whose answer is lost is told as refused, though it was saved.
#
# botocore sends a put_item again when its answer does not arrive. The condition (the version that was read) then fails by the first one's own effect,
# and the caller gets ConditionalCheckFailedException. Who reads again and applies the change once more, as compare-and-set code does,
# applies it twice. With Config(retries={"total_max_attempts": 1}) the caller is told that the outcome is unknown.
#
# Needs Python 3.11 (moto's server stands for DynamoDB). Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet boto3==1.44.8 "moto[server]==5.2.5"
cat > "$folder/run.py" <<'PYTHON'
import socket
import threading

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from moto.server import ThreadedMotoServer

moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
moto.start()
target = moto.get_host_and_port()


class Cutting:
    """A proxy that keeps the first answer to a PutItem to itself, once it is switched on."""

    def __init__(self):
        self.cuts = False
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.server.accept()
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client):
        with client, socket.create_connection(target) as server:
            while asked := message(client):
                server.sendall(asked)
                answered = message(server)
                if b"PutItem" in asked and self.cuts:
                    self.cuts = False
                    return
                client.sendall(answered)


def message(reader):
    """Read a request or an answer whole."""
    read = reader.recv(65536)
    head, _, body = read.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
    while read and len(body) < length:
        more = reader.recv(65536)
        read, body = read + more, body + more
    return read


proxy = Cutting()
account = {"region_name": "eu-west-1", "aws_access_key_id": "a", "aws_secret_access_key": "b"}
found = {}
for name, config in (("default", None), ("one attempt", Config(retries={"total_max_attempts": 1}))):
    client = boto3.client("dynamodb", endpoint_url=f"http://127.0.0.1:{proxy.port}", config=config, **account)
    if name == "default":
        client.create_table(
            TableName="t",
            KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
            BillingMode="PAY_PER_REQUEST",
        )
    client.put_item(TableName="t", Item={"id": {"S": "a"}, "version": {"N": "1"}})
    proxy.cuts = True
    try:
        client.put_item(
            TableName="t",
            Item={"id": {"S": "a"}, "version": {"N": "2"}},
            ConditionExpression="version = :seen",
            ExpressionAttributeValues={":seen": {"N": "1"}},
        )
        told = "saved"
    except ClientError as error:
        told = error.response["Error"]["Code"]
    except BotoCoreError as error:
        told = type(error).__name__
    saved = client.get_item(TableName="t", Key={"id": {"S": "a"}})["Item"]["version"]["N"]
    found[name] = told, saved
    print(f"{name}: told {told}, and the version is {saved}")
assert found["default"] == ("ConditionalCheckFailedException", "2"), found
assert found["one attempt"] == ("ConnectionClosedError", "2"), found
moto.stop()
PYTHON
cd "$folder"
"$folder/venv/bin/python" run.py 2>/dev/null
