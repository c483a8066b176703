//! URLs: which may be asked, where a redirect may lead, and how one is shown to people.

use reqwest::Url;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error("it is no URL")]
    Malformed,
    #[error("{0:?} is not https")]
    Scheme(String),
    #[error("plain http is not allowed for this file")]
    Plain,
    #[error("it redirects from https to {0:?}")]
    Downgrade(String),
    #[error("it redirects to a URL with user name or password")]
    Credentials,
    #[error("it redirects to nowhere, or to something that is no URL")]
    Nowhere,
    #[error("it redirects more than {0} times")]
    Hops(usize),
}

/// Control characters and length: what comes from servers is shown on terminals.
pub fn plain(text: &str) -> String {
    const MOST: usize = 300;
    let mut shown: String = text
        .chars()
        .take(MOST)
        .map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c })
        .collect();
    if text.chars().count() > MOST {
        shown.push('…');
    }
    shown
}

/// A URL without what may be secret: user name, password, query.
pub fn shown(url: &Url) -> String {
    let mut url = url.clone();
    // Both refuse URLs that cannot have either.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    plain(url.as_str())
}

/// Judge a URL of the request.
pub fn first(text: &str, plain_http: bool) -> Result<Url, AddressError> {
    let mut url = Url::parse(text).map_err(|_| AddressError::Malformed)?;
    match url.scheme() {
        "https" => {}
        "http" if plain_http => {}
        "http" => return Err(AddressError::Plain),
        other => return Err(AddressError::Scheme(plain(other))),
    }
    if !url.has_host() {
        return Err(AddressError::Malformed);
    }
    url.set_fragment(None);
    Ok(url)
}

/// Judge where a redirect leads. User name and password of the first URL go along to the same host only.
pub fn hop(from: &Url, location: &[u8], plain_http: bool) -> Result<Url, AddressError> {
    let location = std::str::from_utf8(location).map_err(|_| AddressError::Nowhere)?;
    let mut to = from.join(location).map_err(|_| AddressError::Nowhere)?;
    match (from.scheme(), to.scheme()) {
        (_, "https") => {}
        ("https", other) => return Err(AddressError::Downgrade(plain(other))),
        (_, "http") if plain_http => {}
        (_, "http") => return Err(AddressError::Plain),
        (_, other) => return Err(AddressError::Scheme(plain(other))),
    }
    if !to.has_host() {
        return Err(AddressError::Nowhere);
    }
    let same = to.origin() == from.origin();
    let has = !to.username().is_empty() || to.password().is_some();
    // A relative one inherits them.
    if has && (!same || to.username() != from.username() || to.password() != from.password()) {
        return Err(AddressError::Credentials);
    }
    if same && !has {
        // An https or http URL with a host takes both.
        let _ = to.set_username(from.username());
        let _ = to.set_password(from.password());
    }
    to.set_fragment(None);
    Ok(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_shown() {
        let show = |text| shown(&Url::parse(text).expect("a URL"));
        assert_eq!(show("https://me:secret@mirror.example/x"), "https://mirror.example/x");
        assert_eq!(show("https://mirror.example/a@b?token=secret#secret"), "https://mirror.example/a@b");
        assert_eq!(plain("a\u{1b}[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
        assert_eq!(plain(&"x".repeat(1000)).chars().count(), 301);
    }

    #[test]
    fn what_may_be_asked() {
        let ask = |text, plain| first(text, plain).map(|url| url.to_string());
        assert_eq!(ask("https://a.example/x#y", false), Ok("https://a.example/x".to_owned()));
        assert_eq!(ask("http://a.example/x", true), Ok("http://a.example/x".to_owned()));
        assert_eq!(ask("http://a.example/x", false), Err(AddressError::Plain));
        for (bad, error) in [
            ("file:///etc/passwd", AddressError::Scheme("file".to_owned())),
            ("ftp://a.example/", AddressError::Scheme("ftp".to_owned())),
            ("data:,x", AddressError::Scheme("data".to_owned())),
            ("/x", AddressError::Malformed),
            ("https://", AddressError::Malformed),
            ("", AddressError::Malformed),
        ] {
            assert_eq!(ask(bad, true), Err(error), "{bad}");
        }
    }

    #[test]
    fn where_redirects_may_lead() {
        let from = |text, location: &str, plain| {
            hop(&Url::parse(text).expect("a URL"), location.as_bytes(), plain).map(|url| url.to_string())
        };
        let https = "https://me:secret@a.example/d/x";
        assert_eq!(from(https, "y", false), Ok("https://me:secret@a.example/d/y".to_owned()));
        assert_eq!(from(https, "/y?z", false), Ok("https://me:secret@a.example/y?z".to_owned()));
        assert_eq!(from(https, "https://a.example/y", false), Ok("https://me:secret@a.example/y".to_owned()));
        assert_eq!(from(https, "https://a.example:444/y", false), Ok("https://a.example:444/y".to_owned()));
        assert_eq!(from(https, "//b.example/y", false), Ok("https://b.example/y".to_owned()));
        assert_eq!(from(https, "http://a.example/y", true), Err(AddressError::Downgrade("http".to_owned())));
        assert_eq!(from(https, "file:///etc/passwd", true), Err(AddressError::Downgrade("file".to_owned())));
        assert_eq!(from(https, "https://u:p@b.example/", true), Err(AddressError::Credentials));
        assert_eq!(from(https, "https://other@a.example/", true), Err(AddressError::Credentials));
        assert_eq!(from(https, "https://", true), Err(AddressError::Nowhere));
        let http = "http://a.example/x";
        assert_eq!(from(http, "http://b.example/y", true), Ok("http://b.example/y".to_owned()));
        assert_eq!(from(http, "https://b.example/y", true), Ok("https://b.example/y".to_owned()));
        assert_eq!(from(http, "gopher://b.example/y", true), Err(AddressError::Scheme("gopher".to_owned())));
        assert_eq!(hop(&Url::parse(http).expect("a URL"), b"\xff", true), Err(AddressError::Nowhere));
    }
}
