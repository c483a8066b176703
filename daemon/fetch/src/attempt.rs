//! One attempt at one URL: redirects judged hop by hop, headers judged, the body written as it comes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use casemate_worker::protocol::{Failure, FetchItem};
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_RANGE, ETAG, HeaderValue, IF_RANGE, LOCATION, RANGE,
};
use reqwest::{Client, Response, StatusCode, Url};

use crate::Limits;
use crate::address::{self, AddressError, plain};
use crate::range;

/// Why an attempt failed, and what is left to try.
#[derive(Debug)]
pub enum Attempt {
    /// The same mirror may go on from where it broke off.
    Broken { connect: bool, why: String },
    /// This mirror is of no use for this file.
    Useless { reason: Reason, why: String },
    /// No mirror will help.
    Final(Failure),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    Missing,
    TooLarge,
    Other,
}

fn useless(why: impl Into<String>) -> Attempt {
    Attempt::Useless { reason: Reason::Other, why: why.into() }
}

impl From<AddressError> for Attempt {
    fn from(error: AddressError) -> Self {
        useless(error.to_string())
    }
}

/// An error with its causes, without URLs, which may hold secrets.
pub fn chain(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut next = std::error::Error::source(&error);
    while let Some(source) = next {
        let more = source.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = source.source();
    }
    plain(&text)
}

fn broken(error: reqwest::Error) -> Attempt {
    Attempt::Broken { connect: error.is_connect(), why: chain(error) }
}

/// What one item has so far.
#[derive(Debug)]
pub struct State {
    /// Bytes that are in the file, from the item's offset on.
    pub have: u64,
    /// A strong `ETag` of what the bytes are from, where the size is not known beforehand.
    pub tag: Option<HeaderValue>,
}

/// The slowest that a server may be, measured in windows of time.
struct Pace<'a> {
    limits: &'a Limits,
    since: Instant,
    bytes: u64,
}

impl<'a> Pace<'a> {
    fn new(limits: &'a Limits) -> Self {
        Self { limits, since: Instant::now(), bytes: 0 }
    }

    /// Wait for something that is to come within the window.
    async fn keep<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Attempt> {
        let left = self.limits.patience.saturating_sub(self.since.elapsed());
        let why = || {
            let (bytes, seconds) = (self.bytes, self.limits.patience.as_secs_f64());
            useless(format!(
                "too slow: {bytes} bytes in {seconds} s, the least is {} a second",
                self.limits.slowest
            ))
        };
        tokio::time::timeout(left, work).await.map_err(|_| why())
    }

    /// Count bytes; where enough came, a new window begins.
    fn count(&mut self, bytes: u64) {
        self.bytes += bytes;
        let least = self.limits.patience.as_secs_f64() * self.limits.slowest as f64;
        if self.bytes as f64 >= least {
            (self.since, self.bytes) = (Instant::now(), 0);
        }
    }
}

/// All that an attempt needs beside its URL.
pub struct Attempts<'a> {
    pub client: &'a Client,
    pub limits: &'a Limits,
    pub item: &'a FetchItem,
    pub output: &'a File,
}

impl Attempts<'_> {
    /// The URL that served the body, once it is complete.
    pub async fn run(&self, url: &Url, state: &mut State, tell: &dyn Fn(u64)) -> Result<(), Attempt> {
        let mut pace = Pace::new(self.limits);
        let (served, response) = self.ask(url.clone(), state, &mut pace).await?;
        self.judge(&served, &response, state)?;
        tell(state.have);
        self.take(response, state, &mut pace, tell).await?;
        match self.item.size {
            Some(size) if state.have != size => Err(Attempt::Broken {
                connect: false,
                why: format!("the body ended after {} of {size} bytes", state.have),
            }),
            _ => Ok(()),
        }
    }

    /// Follow redirects up to an answer.
    async fn ask(
        &self,
        mut url: Url,
        state: &State,
        pace: &mut Pace<'_>,
    ) -> Result<(Url, Response), Attempt> {
        for _ in 0..=self.limits.hops {
            let mut request = self.client.get(url.clone()).header(ACCEPT_ENCODING, "identity");
            if state.have > 0 {
                request = request.header(RANGE, format!("bytes={}-", state.have));
                if let Some(tag) = &state.tag {
                    request = request.header(IF_RANGE, tag);
                }
            }
            let response = pace.keep(request.send()).await?.map_err(broken)?;
            let moved = [301, 302, 303, 307, 308].contains(&response.status().as_u16());
            if !moved {
                return Ok((url, response));
            }
            let location = response.headers().get(LOCATION).ok_or(AddressError::Nowhere)?;
            url = address::hop(&url, location.as_bytes(), self.item.plain_http)?;
        }
        Err(AddressError::Hops(self.limits.hops).into())
    }

    /// Judge status and headers; where the server does not resume, begin anew.
    fn judge(&self, url: &Url, response: &Response, state: &mut State) -> Result<(), Attempt> {
        let header = |name| response.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let status = response.status();
        let shown_status = plain(&status.to_string());
        match status {
            StatusCode::PARTIAL_CONTENT if state.have > 0 => {
                let text = header(CONTENT_RANGE).unwrap_or_default();
                let range = range::parse(text).filter(|range| range.continues(state.have, self.item.size));
                let length = range.map(|range| range.total - state.have);
                if range.is_none() || response.content_length().is_some_and(|told| Some(told) != length) {
                    let why = format!(
                        "asked for all from byte {} on, it answers with {:?}",
                        state.have,
                        plain(text)
                    );
                    state.have = 0;
                    return Err(Attempt::Broken { connect: false, why });
                }
            }
            StatusCode::OK => state.have = 0,
            StatusCode::NOT_FOUND | StatusCode::GONE => {
                return Err(Attempt::Useless { reason: Reason::Missing, why: shown_status });
            }
            StatusCode::RANGE_NOT_SATISFIABLE if state.have > 0 => {
                state.have = 0;
                return Err(Attempt::Broken { connect: false, why: shown_status });
            }
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
                return Err(Attempt::Broken { connect: false, why: shown_status });
            }
            _ if status.is_server_error() => {
                return Err(Attempt::Broken { connect: false, why: shown_status });
            }
            _ => return Err(useless(format!("it answers {shown_status}"))),
        }
        if let Some(encoding) = response.headers().get(CONTENT_ENCODING) {
            // Old servers say so of files that are compressed by themselves, and send these as they are.
            let own = match encoding.as_bytes() {
                b"identity" => true,
                b"gzip" | b"x-gzip" => url.path().ends_with("gz"),
                _ => false,
            };
            if !own {
                let encoding = plain(&String::from_utf8_lossy(encoding.as_bytes()));
                return Err(useless(format!("it encodes the body as {encoding:?}, which was not asked for")));
            }
        }
        state.tag = header(ETAG)
            .filter(|tag| self.item.size.is_none() && tag.starts_with('"'))
            .and_then(|tag| HeaderValue::from_str(tag).ok());
        let told = response.content_length().map(|length| state.have.saturating_add(length));
        match (self.item.size, told) {
            (Some(size), Some(told)) if told != size => {
                Err(useless(format!("it announces {told} bytes, the index says {size}")))
            }
            (None, Some(told)) if told > self.item.limit => {
                Err(self.too_large(format!("it announces {told} bytes")))
            }
            _ => Ok(()),
        }
    }

    fn too_large(&self, what: String) -> Attempt {
        let limit = self.item.limit;
        Attempt::Useless {
            reason: Reason::TooLarge,
            why: format!("{what}, more than the {limit} that are allowed"),
        }
    }

    /// Write the body where it belongs.
    async fn take(
        &self,
        mut response: Response,
        state: &mut State,
        pace: &mut Pace<'_>,
        tell: &dyn Fn(u64),
    ) -> Result<(), Attempt> {
        while let Some(chunk) = pace.keep(response.chunk()).await?.map_err(broken)? {
            let end = state.have.saturating_add(chunk.len() as u64);
            match self.item.size {
                Some(size) if end > size => {
                    // None of it can be trusted to be the beginning of the right one.
                    state.have = 0;
                    return Err(useless(format!("the body is longer than the {size} bytes of the index")));
                }
                None if end > self.item.limit => {
                    state.have = 0;
                    return Err(self.too_large("the body goes on".to_owned()));
                }
                _ => {}
            }
            self.output
                .write_all_at(&chunk, self.item.offset.saturating_add(state.have))
                .map_err(|error| Attempt::Final(Failure::io("the download's file", &error)))?;
            state.have = end;
            tell(end);
            pace.count(chunk.len() as u64);
        }
        Ok(())
    }
}
