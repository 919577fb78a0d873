"""Ask a running endpoint (`tsq serve`): call_endpoint.py URL VIDEO...

Needs httpx (`pip install httpx`). A bearer token, if the endpoint requires one, comes from the
environment variable TSQ_TOKEN.
"""

import os
import sys
import time

import httpx


def main(url: str, *videos: str) -> None:
    """Upload each video and print its labels; wait and try again while the endpoint is full."""
    token = os.environ.get("TSQ_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(base_url=url, headers=headers, timeout=300) as client:
        for video in videos:
            response = ask(client, video)
            answer = response.json()
            if response.status_code == 200:
                best, score = answer["top_labels"][0], answer["top_scores"][0]
                seconds = ", ".join(f"{pts:.2f}" for pts in answer["selected_pts_s"])
                print(f"{video}: {best} {score:.3f}, chosen frames at {seconds} s")
            else:
                print(f"{video}: {answer.get('error_type') or answer['title']}: {answer['detail']}")


def ask(client: httpx.Client, video: str) -> httpx.Response:
    """Return the endpoint's answer for one video, after at most ten attempts."""
    for _ in range(10):
        with open(video, "rb") as file:
            response = client.post("/v1/score", files={"file": (os.path.basename(video), file)})
        if response.status_code not in (429, 503):
            break
        time.sleep(float(response.headers.get("Retry-After", 1)))
    return response


if __name__ == "__main__":
    main(*sys.argv[1:])
